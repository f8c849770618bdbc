"""Dumps the stacks of all threads to the log on a signal, to diagnose a process that hangs."""

import faulthandler
import signal

# Not used by vLLM 0.26 to 0.32.
ASKS = signal.SIGUSR2


def show_when_asked() -> None:
    """Registers ``ASKS`` to dump all stacks to standard error. Raises if that is closed."""
    faulthandler.register(ASKS, all_threads=True)
