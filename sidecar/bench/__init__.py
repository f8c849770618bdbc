"""The bench: optimizers compared on simulated tuning runs."""
