"""What the plugin reports: telemetry, and real users' requests."""
