"""The engine as the operating system sees it: a process group, a log file, an HTTP port."""
