"""The report of one run: what was decided and why, as a page that needs nothing else."""
