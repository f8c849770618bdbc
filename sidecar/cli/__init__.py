"""The command `sloguard`."""
