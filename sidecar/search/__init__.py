"""Optimizers behind one contract: each proposes a configuration from the full history and keeps no state."""
