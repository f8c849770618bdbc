"""What runs inside vLLM: the plugin, the stat logger, live changes."""
