"""The report of one run: the decision and its evidence, as a self-contained page."""
