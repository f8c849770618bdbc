"""The memory model and the repair of engine arguments. Imports nothing of vLLM."""
