"""Where the command `sloguard` begins: a Ctrl-C while its modules are still being imported ends it without a word."""

import signal


def main() -> None:
    """Imports the command, and runs it."""
    handled = signal.getsignal(signal.SIGINT)
    if handled is signal.default_int_handler:  # in the background it may be ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sidecar.cli.main import main as run

    signal.signal(signal.SIGINT, handled)
    run()


if __name__ == "__main__":
    main()
