"""Repairs or refuses a configuration before it is started, and learns from starts and crashes."""
