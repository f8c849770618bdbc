"""The bench: compares optimizers on simulated tuning runs."""
