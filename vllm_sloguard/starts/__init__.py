"""The fork server, the load generator and the warm-up."""
