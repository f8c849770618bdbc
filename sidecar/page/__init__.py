"""The live page of `sloguard serve`."""
