"""The loop of `sloguard serve`: windows, the serving engine, probation, drain hooks."""
