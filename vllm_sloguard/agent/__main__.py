"""``sloguard-agent``: runs engines for a sidecar, and serves without one."""

import os
import sys
import time
from contextlib import suppress

from vllm_sloguard.agent.options import OptionError, read_options


def main() -> int:
    """Runs until a signal, or until the service of its command line ends; returns the exit code."""
    try:
        options = read_options(sys.argv[1:], os.environ)
    except OptionError as error:
        print(f"sloguard-agent: {error}", file=sys.stderr)
        return 2
    from vllm_sloguard.agent.daemon import run_agent

    return run_agent(options, _say)


def _say(text: str) -> None:
    with suppress(OSError):  # a full disk must not end the agent
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} sloguard-agent: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
