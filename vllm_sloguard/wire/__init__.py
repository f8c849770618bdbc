"""Code generated from ``protos/sloguard/v1`` by ``make proto``; nothing in here is written by hand but this line."""
