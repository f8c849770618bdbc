"""promoted.yaml: its evidence, that it is written atomically, and that earlier versions are kept."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from sidecar_cases import configured, measured, planned, trial

from sidecar.config.schema import Config
from sidecar.promote import promoted_file, provenance
from sidecar.record.decisions import Decision, Outcome
from sidecar.record.trial import Result, Role, Trial

ARGS = {"max_num_seqs": 8, "enable_prefix_caching": True}
RESULT = Result(value=-80.0, measurement=measured(), vllm_version="0.26.0")
TRIALS: list[Trial] = [
    trial(1, planned(Role.BASELINE, max_num_seqs=2), RESULT),
    trial(2, planned(Role.SEARCH), RESULT),
    trial(3, planned(Role.REFERENCE), RESULT),
    trial(4, planned(Role.VALIDATION), RESULT),
]
PROMOTED = Decision(Outcome.PROMOTED, "better", 4, gain=0.2, pairs=1, incumbents=(3,), candidates=(4,))


def with_model(folder: Path) -> Config:
    """Of a model in a local folder."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    config = configured(folder, "model", "model")
    config.state.mkdir()
    return config


def test_the_evidence_is_in_the_comments(tmp_path: Path) -> None:
    config = with_model(tmp_path)

    text = promoted_file.write(config, ARGS, PROMOTED, TRIALS).read_text()

    assert "# Decision: promoted: better." in text
    assert "# Run 1, 4 trials; `sloguard trials" in text
    assert "# vLLM 0.26.0 on " in text  # as the engines reported, whatever is installed here
    assert hashlib.sha256(b"{}").hexdigest() in text
    assert "# incumbent, trial 3: feasible, 200 requests, ttft_p99_ms 10 of 500" in text
    assert "# candidate, trial 4: feasible, 200 requests, ttft_p99_ms 10 of 500" in text
    assert "# Load: 4 requests/s of about 512 + 128 tokens; objective latency." in text
    assert yaml.safe_load(text) == {
        "model": str(tmp_path / "model"),
        "max-num-seqs": 8,
        "enable-prefix-caching": True,
    }


def test_provenance_names_the_processor(tmp_path: Path) -> None:
    config = with_model(tmp_path)
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")

    origin = provenance.of(config, TRIALS, proc_root=tmp_path)

    if origin.driver is None:  # without a GPU
        assert origin.device == "CPU: Some CPU @ 2 GHz"
    assert origin.workload.rate == 4
    assert provenance.of(config, [], proc_root=tmp_path / "nowhere").vllm == "unknown"


def test_versions_are_kept_when_the_arguments_change(tmp_path: Path) -> None:
    config = with_model(tmp_path)
    for number in range(1, 31):
        promoted_file.write(config, {**ARGS, "max_num_seqs": number}, PROMOTED, TRIALS)
        promoted_file.write(config, {**ARGS, "max_num_seqs": number}, PROMOTED, TRIALS)

    versions = sorted((config.state / "promoted").iterdir())
    assert [path.name for path in versions] == [f"{number:04}.yaml" for number in range(11, 31)]
    assert [yaml.safe_load(path.read_text())["max-num-seqs"] for path in versions] == list(range(11, 31))
    assert yaml.safe_load((config.state / "promoted.yaml").read_text())["max-num-seqs"] == 30


def test_damaged_versions_are_skipped(tmp_path: Path) -> None:
    config = with_model(tmp_path)
    (config.state / "promoted").mkdir()
    (config.state / "promoted" / "0003.yaml").write_bytes(b"\xff: [")
    (config.state / "promoted" / "notes.yaml").write_text("mine")

    promoted_file.write(config, ARGS, PROMOTED, TRIALS)

    names = sorted(path.name for path in (config.state / "promoted").iterdir())
    assert names == ["0003.yaml", "0004.yaml", "notes.yaml"]


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_promoted_file import ARGS, PROMOTED, TRIALS
from sidecar.promote import promoted_file
from sidecar.config.schema import load_config
config = load_config(Path(sys.argv[1]))
for number in range(10**6):
    promoted_file.write(config, {**ARGS, "max_num_seqs": number}, PROMOTED, TRIALS)
    if not number:
        print("ready", flush=True)
"""


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    config = with_model(tmp_path)
    here = str(Path(__file__).parent)
    path = config.state / "promoted.yaml"
    for wait_s in (0.05, 0.11, 0.23):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "sloguard.yaml"), here],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, here])},
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(wait_s)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        for file in [path, *(config.state / "promoted").glob("*.yaml")]:
            content = yaml.safe_load(file.read_text())
            assert set(content) == {"model", "max-num-seqs", "enable-prefix-caching"}
