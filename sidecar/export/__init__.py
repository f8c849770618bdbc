"""The trials in the formats of other tools: Optuna, `vllm bench serve`, CSV, JSON lines."""
