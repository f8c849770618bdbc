"""Checks before anything is started: `sloguard doctor` and `sloguard plan`."""
