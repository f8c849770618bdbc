"""The vLLM engine at the operating-system level: process group, log file, HTTP port."""
