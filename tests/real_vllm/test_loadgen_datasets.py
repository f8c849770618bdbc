"""Prompts from files, read by vLLM's own benchmark."""

import json
import os
import sys
from pathlib import Path

import pytest
from engine_bench import DEMO
from streaming_engine import StreamingEngine, serving

from sidecar.config.workload_section import Dataset, Workload
from sidecar.measure.load_client import LoadClient, LoadError

pytestmark = pytest.mark.timeout(600)

MODEL = str(DEMO / "model")


def workload(name: Dataset, path: Path) -> Workload:
    return Workload(
        rate=50, requests=20, input_tokens=32, output_tokens=8, warmup_requests=0, request_timeout_s=120,
        dataset_name=name, dataset_path=path,
    )  # fmt: skip


def lengths(client: LoadClient, given: Workload) -> list[int]:
    """The output tokens of each request: one more than its inter-token gaps."""
    with serving(StreamingEngine(seats=8, step_s=0.002)) as engine:
        load = client.run(given, engine.url, MODEL, MODEL, lambda: False)
    assert [r.error for r in load.requests] == [""] * 20
    return sorted(len(r.itls_s) + 1 for r in load.requests)


def test_custom_prompts_have_their_own_lengths(client: LoadClient, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "some words", "output_tokens": 4 + 2 * (n % 2)} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert set(lengths(client, workload(Dataset.CUSTOM, path))) == {4, 6}


def test_conversations_keep_their_output_lengths(client: LoadClient, tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    turns = [{"from": "human", "value": "a b c d e f g h"}, {"from": "gpt", "value": "i j k l m n o p"}]
    path.write_text(json.dumps([{"conversations": turns}] * 40))

    assert len(set(lengths(client, workload(Dataset.SHAREGPT, path)))) == 1


def test_an_unreadable_file_is_an_error(client: LoadClient, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "no prompt"}\n')

    with pytest.raises(LoadError, match="must contain a 'prompt' column"):
        client.run(workload(Dataset.CUSTOM, path), "http://127.0.0.1:9", MODEL, MODEL, lambda: False)


def test_custom_prompts_without_pandas_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "pandas.py").write_text("raise ImportError")
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join((str(tmp_path), *filter(None, sys.path)))}
    client = LoadClient(sys.executable, tmp_path / "client.log", environment)
    try:
        with pytest.raises(LoadError, match="pip install pandas beside vLLM"):
            client.run(
                workload(Dataset.CUSTOM, tmp_path / "prompts.jsonl"), "http://127.0.0.1:9", MODEL, MODEL, lambda: False
            )
    finally:
        client.close()
