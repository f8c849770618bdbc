"""The promotion decision, probation, and promoted.yaml."""
