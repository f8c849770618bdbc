"""`sloguard dev bench promotion`: a few windows with known truth, with generous bounds."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sidecar.bench.simulated_windows import PromotionScenario, Recording, recorded, tally
from sidecar.cli.bench import bench_app
from sidecar.cli.bench_promotion import RECORDED_STARTS
from sidecar.config.schema import ConfigError


@pytest.fixture(scope="module")
def recording() -> Recording:
    return recorded(RECORDED_STARTS)


def test_the_recording_is_of_real_loads(recording: Recording) -> None:
    assert recording.shapes.shape[1] == 100
    assert np.allclose(recording.shapes.mean(axis=1), 1)
    assert np.percentile(recording.shapes, 99) > 1


@pytest.mark.parametrize(
    ("factor", "noise", "low", "high"),
    [
        (1.0, 0.015, 0.0, 0.05),
        (1.0, 0.1, 0.0, 0.05),
        (1.1, 0.015, 0.0, 0.025),
        (1.1, 0.1, 0.0, 0.025),
        (0.9, 0.015, 0.8, 1.0),
    ],
)
def test_how_often_it_promotes(recording: Recording, factor: float, noise: float, low: float, high: float) -> None:
    result = tally(PromotionScenario("small", factor, noise), recording, windows=40, seed=7)

    assert low <= result.promoted / 40 <= high
    assert result.promoted + result.kept + result.worse + result.inconclusive == 40


def test_the_luckiest_of_equal_trials_is_validated_and_not_promoted(recording: Recording) -> None:
    """Judged by the search's own measurements, nearly all of them would have been promoted."""
    result = tally(PromotionScenario("small", 1.0, 0.05), recording, windows=40, seed=7)

    assert result.validated >= 30
    assert result.promoted <= 2


def test_the_same_seed_gives_the_same_windows(recording: Recording) -> None:
    case = PromotionScenario("small", 0.9, 0.05)

    assert tally(case, recording, 5, seed=1) == tally(case, recording, 5, seed=1)


def test_the_command_reports_which_bounds_hold() -> None:
    ended = CliRunner().invoke(bench_app, ["promotion", "--windows", "2", "--json"])

    rows = json.loads(ended.stdout)
    assert {row["case"] for row in rows} >= {"A100: equal", "recorded starts: 10% better", "power"}
    assert all(row["promoted"] + row["kept"] + row["worse"] + row["inconclusive"] == 2 for row in rows)
    assert ended.exit_code == (0 if all(row["holds"] is not False for row in rows) else 1)


BAD = ["{", "[]", '{"scores": []}', '{"scores": [0.1]}', '{"scores": [0.1, -1]}', '{"scores": 1}']


@pytest.mark.parametrize("row", BAD)
def test_a_bad_recording_is_one_line(tmp_path: Path, row: str) -> None:
    path = tmp_path / "starts.jsonl"
    path.write_text(f"{row}\n" * 3)

    with pytest.raises(ConfigError, match="--starts: ") as raised:
        recorded(path)
    assert len(str(raised.value).splitlines()) == 1
