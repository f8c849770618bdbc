"""Entry point of the command `sloguard`."""

import importlib.util
import signal
import sys

# One package of the extra stands for all of them.
_OF_THE_EXTRA = "typer"


def main() -> None:
    """Imports the command, and runs it. A Ctrl-C during the imports ends it without a traceback."""
    if importlib.util.find_spec(_OF_THE_EXTRA) is None:
        needed = "pip install 'vllm-sloguard[sidecar]'"
        sys.exit(f"sloguard: only the vLLM plugin is installed here; for this command: {needed}")
    handled = signal.getsignal(signal.SIGINT)
    if handled is signal.default_int_handler:  # in the background it may be ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sidecar.cli.main import main as run

    signal.signal(signal.SIGINT, handled)
    run()


if __name__ == "__main__":
    main()
