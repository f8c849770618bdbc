"""Copies the service's output, which goes to a file, to the agent's own, as `vllm serve` itself would print it."""

import os
from pathlib import Path

_MAX_BYTES = 2**20


class OutputCopy:
    """Follows one log at a time; output that can't be written is dropped."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._log: Path | None = None
        self._offset = 0

    def follow(self, log: Path) -> None:
        """Copies what is new in ``log``, at most 1 MiB."""
        if log != self._log:
            self._log, self._offset = log, 0
        try:
            with log.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < self._offset:  # it was truncated
                    self._offset = 0
                if size == self._offset:
                    return
                file.seek(self._offset)
                output = file.read(_MAX_BYTES)
        except OSError:
            return
        self._offset += len(output)
        self._write(output)

    def finish(self, log: Path) -> None:
        """Copies the rest."""
        while True:
            before = (self._log, self._offset)
            self.follow(log)
            if before == (self._log, self._offset):
                return

    def _write(self, output: bytes) -> None:
        try:
            while output:
                output = output[os.write(self._target, output) :]
        except OSError:
            return
