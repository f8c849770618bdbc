"""Exports trials to other formats: Optuna, `vllm bench serve`, CSV, JSON lines."""
