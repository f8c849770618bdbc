"""The demo's calibration of its load, and its ten lines at the end."""

import importlib.util
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
from report_cases import only_crashes, whole

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "run.py"
# One request at a time, like an engine that is saturated.
SERVICE_S = 0.02
ONE_AT_A_TIME = threading.Lock()


@pytest.fixture(scope="module", name="demo")
def _demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_run", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Engine(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({"data": [{"id": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (len(body["prompt"]), body["max_tokens"]) == (128, 32)
        with ONE_AT_A_TIME:
            time.sleep(SERVICE_S)
        self._answer({"choices": [{"text": "x"}]})

    def _answer(self, content: object) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def base() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_load_is_calibrated_by_what_the_engine_completes(
    demo: ModuleType, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "CALIBRATION_S", 2.0)
    rate = demo.sustained_rate(base, {"input_tokens": 128, "output_tokens": 32})
    assert 0 < rate <= 1.02 / SERVICE_S


def test_a_promotion_is_told_in_ten_lines(demo: ModuleType, tmp_path: Path) -> None:
    promoted, lines = demo.summary(whole(tmp_path / "run", 14), 18.2, 27.3, 150.0)
    assert promoted
    assert len(lines) == 10
    text = "\n".join(lines)
    assert "That sustains 18.2 requests/s; the demo sends 27.3" in text
    assert "was back after 2.5 minutes" in text
    assert "It tried 14 configurations; " in text
    assert " of them met the latency limits" in text
    assert "The best candidate: max_num_seqs 32 → " in text
    assert "Decision: promoted. vLLM serves it from now on" in text


def test_a_window_without_a_candidate_is_told_in_ten_lines_too(demo: ModuleType, tmp_path: Path) -> None:
    promoted, lines = demo.summary(only_crashes(tmp_path / "run", 4), 18.2, 27.3, 150.0)
    assert not promoted
    assert len(lines) == 10
    assert "No configuration was better than the one that served." in lines
