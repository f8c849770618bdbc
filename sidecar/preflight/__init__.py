"""What can be said before anything is started: `sloguard doctor` and `sloguard plan`."""
