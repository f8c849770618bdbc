"""The agent: runs engines, the fork server and the load client where vLLM runs, for a sidecar anywhere."""
