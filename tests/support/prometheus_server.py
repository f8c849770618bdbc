"""A real Prometheus for tests."""

import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from dashboard_queries import ask
from own_ports import own_port

BINARY = shutil.which("prometheus")
_READY_S = 120.0
_POLL_S = 0.1
_REQUEST_S = 60.0


class PrometheusServer:
    """Debian's ``prometheus`` on a free loopback port, which scrapes ``targets`` (host:port by job) each second.

    ``rules`` is a file of rules that it evaluates each second too. Its storage is a temporary folder; it is killed and
    removed at the end.
    """

    def __init__(self, targets: Mapping[str, str], rules: Path | None = None) -> None:
        self._targets = dict(targets)
        self._rules = rules
        self._folder = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> Self:
        """Starts it and waits until it is ready. Raises RuntimeError."""
        if BINARY is None:
            raise RuntimeError("prometheus is not installed (Debian: apt-get install prometheus)")
        self._folder = Path(tempfile.mkdtemp(prefix="sloguard-prometheus-"))
        try:
            self._start(BINARY)
            self.wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills it and removes its storage."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, binary: str) -> None:
        content = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [] if self._rules is None else [str(self._rules.resolve())],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in self._targets.items()
            ],
        }
        config = self._folder / "prometheus.yml"
        config.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
        address = f"127.0.0.1:{own_port()}"
        self.url = f"http://{address}"
        command = [
            binary,
            f"--config.file={config}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address={address}",
            "--log.level=warn",
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def _log(self) -> Path:
        return self._folder / "prometheus.log"

    def wait_until_ready(self, timeout_s: float = _READY_S) -> None:
        """Waits until it answers queries. Raises RuntimeError with its log when it ends or takes too long."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self._process is not None and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/-/ready", timeout=_REQUEST_S):
                    return
            except OSError:
                time.sleep(_POLL_S)
        raise RuntimeError(f"prometheus is not ready: {self._log.read_text(errors='replace')[-2000:]}")

    def wait_until_up(self, timeout_s: float = _READY_S) -> None:
        """Waits until a scrape of each target has succeeded. Raises RuntimeError."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if len(self.query("up == 1")) == len(self._targets):
                return
            time.sleep(_POLL_S)
        raise RuntimeError(f"not all of {self._targets} could be scraped")

    def query(self, promql: str) -> list[dict[str, Any]]:
        """The instant vector of ``promql``: each with "metric" (labels) and "value" ([time, text]).

        Raises ValueError with Prometheus's own words when the query is wrong.
        """
        return ask(self.url, "query", {"query": promql})["result"]

    def rules(self) -> list[dict[str, Any]]:
        """Each rule as Prometheus reports it: "name", "query", "type", "health"."""
        return [rule for group in ask(self.url, "rules", {})["groups"] for rule in group["rules"]]
