"""A real Prometheus for tests, and the queries of a dashboard to ask it."""

import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

BINARY = shutil.which("prometheus")
_READY_S = 30.0
_POLL_S = 0.1
_REQUEST_S = 10.0


class PrometheusServer:
    """Debian's ``prometheus`` on a free loopback port, which scrapes ``target`` (host:port) each second as ``job``.

    Its storage is a temporary folder; it is killed and removed at the end.
    """

    def __init__(self, target: str, *, job: str = "sloguard") -> None:
        self._target = target
        self._job = job
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
        scrape = {"job_name": self._job, "static_configs": [{"targets": [self._target]}]}
        content = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [scrape]}
        config = self._folder / "prometheus.yml"
        config.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
        address = f"127.0.0.1:{_free_port()}"
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
        """Waits until a scrape of the target has succeeded. Raises RuntimeError."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.query(f'up{{job="{self._job}"}} == 1'):
                return
            time.sleep(_POLL_S)
        raise RuntimeError(f"{self._target} could not be scraped")

    def query(self, promql: str) -> list[dict[str, Any]]:
        """The instant vector of ``promql``: each with "metric" (labels) and "value" ([time, text]).

        Raises ValueError with Prometheus's own words when the query is wrong.
        """
        body = urllib.parse.urlencode({"query": promql}).encode()
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query", body, _REQUEST_S) as answer:
                return json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{promql}: {json.load(error).get('error')}") from None


def panel_queries(
    path: Path, *, job: str = ".+", instance: str = ".+", rate: str = "10s", span: str = "5m"
) -> list[str]:
    """Every PromQL of the dashboard at ``path``, its variables replaced; ``rate`` and ``span`` are Grafana's intervals.

    With one scrape a second, ``rate`` holds ten; a rate needs two.
    """
    values = {"$__rate_interval": rate, "$__range": span, "$instance": instance, "$job": job}
    queries: list[str] = []
    for expr in _exprs(json.loads(path.read_text(encoding="utf-8"))["panels"]):
        replaced = expr
        for variable, value in values.items():
            replaced = replaced.replace(variable, value)
        queries.append(replaced)
    return queries


def _exprs(panels: list[dict[str, Any]]) -> Iterator[str]:
    for panel in panels:
        yield from (target["expr"] for target in panel.get("targets", []))
        yield from _exprs(panel.get("panels", []))


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
