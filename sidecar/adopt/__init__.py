"""Reads how vLLM is started today, and writes the configuration file for it."""
