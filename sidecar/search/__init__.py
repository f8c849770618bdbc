"""Optimizers behind one contract: a configuration is proposed from the whole history, and nothing else is kept."""
