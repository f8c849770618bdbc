"""`sloguard plan`: what a window would do, from the file, the machine and the journal."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine_bench import DEMO, write_config
from fake_service import sloguard
from sidecar_cases import planned as a_plan
from sidecar_cases import served, trial

from sidecar.config.schema import load_config
from sidecar.preflight.window_forecast import Durations, Known, drains, durations, forecast
from sidecar.preflight.window_plan import cold, knob_plan
from sidecar.record.events import EventKind, Operations, WindowOutcome
from sidecar.record.journal import Journal
from sidecar.record.trial import Role, TrialStatus
from sidecar.run.tuning_run import open_run
from sidecar.search.contract import Projection
from vllm_sloguard.knobs import KNOBS, Knob, KnobKind, KnobValues


def answer(path: Path, code: int = 0) -> dict[str, Any]:
    done = sloguard("plan", "--json", "-c", path)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def test_a_new_service_is_planned_from_assumptions_and_nothing_is_made(config_file: Path) -> None:
    before = sorted(config_file.parent.rglob("*"))
    found = answer(config_file)
    assert sorted(config_file.parent.rglob("*")) == before
    assert found["problem"] == ""
    assert found["incumbent"]["budget"]["kv_bytes"] == 67108864
    assert {k["name"]: bool(k["cold"]) for k in found["knobs"]} == {
        "max_num_seqs": False,
        "max_num_batched_tokens": False,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": True,
        "block_size": True,
    }
    assert found["slo"]["ttft_p99_ms"] == 2000
    assert found["unguarded"] == [{"kv_cache_memory_bytes": 2**46}]
    assert found["forecast"]["trials"] == 10
    assert found["forecast"]["analyses"] == [3]
    assert all("assumed" in found["takes"][part]["source"] for part in ("drain", "start", "trial", "validation"))
    assert found["next_window"]["next_at"] is None
    assert "no `sloguard serve` is running" in found["next_window"]["refusals"][0]


def test_the_text_has_the_same_content(config_file: Path) -> None:
    done = sloguard("plan", "-c", config_file)
    assert done.returncode == 0
    assert done.stderr == ""
    for said in (
        "verdict: a window could run as configured\n",
        "SLO: ttft_p99 ≤ 2,000 ms, itl_p99 ≤ 60 ms, e2e_p99 ≤ 3,000 ms, error_rate ≤ 1%\n",
        "load: 12 requests/s of about 128 + 32 tokens\n",
        "each counted in the budget:\n  kv_cache_memory_bytes=64 TiB\n",
        "starts: 131,072 KV tokens",
        "live knobs (changed while the engine runs):",
        "  max_num_seqs: 1 to 64; now 2",
        "search: 10 of at most 10 trials",
        "refused now: no `sloguard serve` is running",
    ):
        assert said in done.stdout


def test_a_misspelt_argument_is_reported(config_file: Path) -> None:
    content = yaml.safe_load(config_file.read_text())
    content["engine"]["args"]["max-num-sequences"] = 1
    config_file.write_text(yaml.safe_dump(content))
    said = "engine.args: max_num_sequences is not an argument that the guard knows; did you mean max_num_seqs?"
    assert answer(config_file)["warnings"] == [said]
    assert f"warning: {said}" in sloguard("plan", "-c", config_file).stdout


def test_what_the_journal_has_measured_is_used(config_file: Path) -> None:
    config = load_config(config_file)
    journal = Journal(config.state)
    run = open_run(config, journal)
    for role, took_s in ((Role.BASELINE, 40), (Role.SEARCH, 20), (Role.SEARCH, 30), (Role.VALIDATION, 50)):
        begun = journal.begin_trial(run.id, a_plan(role))
        journal.end_trial(begun, served(-80.0))
        journal.write(
            "UPDATE trials SET started_at = ?, ended_at = ? WHERE number = ?", (0.0, float(took_s), begun.number)
        )
    Operations(journal, config.base_digest()).record(
        EventKind.START, base=config.base_digest(), promotion=None, seconds=33.0
    )
    for at, state in ((10.0, "serving"), (20.0, "draining"), (27.0, "tuning")):
        journal.write("INSERT INTO states (at, state, reason) VALUES (?, ?, '')", (at, state))
    journal.close()

    takes = answer(config_file)["takes"]

    assert takes["trial"] == {"seconds": 30.0, "source": "the mean of 3 trials"}
    assert takes["longest_trial"] == {"seconds": 40.0, "source": "the longest of 3 trials"}
    assert takes["validation"]["seconds"] == 50
    assert takes["start"]["seconds"] == 33
    assert takes["drain"] == {"seconds": 7.0, "source": "the mean of 1 drains"}


def test_trials_of_another_load_are_ignored(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file)
    journal = Journal(config.state)
    begun = journal.begin_trial(open_run(config, journal).id, a_plan())
    journal.end_trial(begun, served(-80.0))
    journal.close()
    content = yaml.safe_load(config_file.read_text())
    content["workload"]["rate"] = 13
    config_file.write_text(yaml.safe_dump(content))
    assert "assumed" in answer(config_file)["takes"]["trial"]["source"]


def test_a_promotion_is_what_is_planned_from(config_file: Path) -> None:
    config = load_config(config_file)
    journal = Journal(config.state)
    journal.promote(None, config.base_digest(), {**config.engine.args, "max_num_seqs": 48})
    journal.close()
    found = answer(config_file)
    assert found["incumbent"]["promotion"] == 1
    assert next(k for k in found["knobs"] if k["name"] == "max_num_seqs")["now"] == 48


def test_repairs_of_the_incumbent_and_values_that_the_guard_rules_out(tmp_path: Path) -> None:
    path = write_config(
        tmp_path,
        engine={
            "args": {
                "max-num-seqs": 64,
                "max-num-batched-tokens": 16,
                "max-model-len": 1024,
                "kv-cache-memory-bytes": 67108864,  # independent of the free memory here
            }
        },
        search={
            "knobs": {
                "block_size": {"choices": [16, 32]},
                "max_model_len": {"low": 100, "high": 4096},
                "max_num_batched_tokens": None,
            }
        },
    )
    found = answer(path)
    [change] = found["incumbent"]["changes"]
    assert (change["name"], change["before"], change["after"]) == ("max_num_batched_tokens", 16, 64)
    assert "below max_num_seqs 64" in change["reason"]
    blocks, length, _ = found["knobs"]
    assert [out["values"] for out in blocks["ruled_out"]] == ["16"]
    assert "multiple of 32" in blocks["ruled_out"][0]["reason"]
    assert [out["values"] for out in length["ruled_out"]] == ["above 2048"]
    assert "model's longest, 2048" in length["ruled_out"][0]["reason"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window": {"duration": "2m"}}, "window.duration: 120 s are too short for a promotion"),
        (
            {"engine": {"args": {"max-model-len": 4096}}, "workload": {"input_tokens": 3000}},
            "the current configuration could not start: max_model_len 4096 is above the model's longest, 2048",
        ),
        (
            {"engine": {"args": {"max-model-len": 100}}},
            "workload: its longest request has 240 tokens, but max_model_len is 100",
        ),
        (
            {
                "engine": {"args": {"max-num-seqs": 64, "max-num-batched-tokens": 16}},
                "search": {"knobs": {"block_size": None}},
            },
            "except the current one: max_num_batched_tokens 16 is below max_num_seqs 64; pinned:",
        ),
        ({"search": {"knobs": {"block_size": {"choices": [16]}}}}, "search.knobs: the guard allows no value"),
    ],
)
def test_a_configuration_that_cannot_run_is_one_line_and_code_1(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = write_config(tmp_path, **changes)
    done = sloguard("plan", "-c", path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert said in answer(path, code=1)["problem"]
    assert done.stdout.startswith("verdict: no window could run: ")


def test_what_refuses_a_window_now(config_file: Path) -> None:
    content = yaml.safe_load(config_file.read_text())
    content["window"] |= {"cron": "0 3 * * *", "max_rate": 5.0}
    config_file.write_text(yaml.safe_dump(content))
    config = load_config(config_file)
    journal = Journal(config.state)
    operations = Operations(journal, config.base_digest())
    operations.record(EventKind.WINDOW_OPENED, reason="", record=None)
    operations.record(EventKind.WINDOW_ENDED, outcome=WindowOutcome.FAILED, reason="it broke")
    before = time.time()
    found = answer(config_file)["next_window"]
    assert "the window that ended" in found["refusals"][1]
    assert before < found["next_at"] <= time.time() + 25 * 3600  # a day has at most 25 hours
    assert "above 5 requests/s" in found["notes"][0]
    operations.record(EventKind.PAUSED, reason="release week")
    assert "release week" in answer(config_file)["next_window"]["refusals"][1]


def test_goodput_is_planned_as_the_share_that_may_miss(tmp_path: Path) -> None:
    done = sloguard("plan", "-c", write_config(tmp_path, slo={"goodput": 0.98}))
    assert "error_rate ≤ 1%, miss_rate ≤ 2%\n" in done.stdout


def test_a_mistake_in_the_file_is_code_2(tmp_path: Path) -> None:
    path = write_config(tmp_path, search={"optimizer": "none"})
    done = sloguard("plan", "-c", path)
    assert done.returncode == 2
    assert "optimizer" in done.stderr


def in_seconds(trial_s: float, start_s: float, validation_s: float, warm_s: float = 0.0) -> Durations:
    known = (Known(s, "") for s in (10.0, start_s, trial_s, trial_s, validation_s, warm_s))
    return Durations(*known)


def test_time_left_for_the_validation_bounds_the_search(tmp_path: Path) -> None:
    path = write_config(tmp_path, promotion={"pairs": [3, 5]}, search={"budget": 8}, window={"duration": "1000s"})
    config = load_config(path)
    # The first half leaves time for 3 pairs, 240 s, the second for 5, 400 s; the restore takes 60.
    found = forecast(config, in_seconds(50.0, 60.0, 40.0))
    assert (found.trials, found.pairs_reserved, found.analyses, found.pairs) == (8, 5, (3, 5), 5)
    slower = forecast(config, in_seconds(120.0, 60.0, 40.0))
    # 990 - 4 * 120 = 510 are left, and a fifth needs 60 + 120 + 400.
    assert (slower.trials, slower.pairs_reserved, slower.analyses, slower.pairs) == (4, 3, (3, 5), 5)
    assert not forecast(config, in_seconds(600.0, 60.0, 40.0)).decides
    assert slower.least_window_s == 10 + 120 + 120 + 240 + 60


def test_the_unmeasured_start_of_each_side_is_forecast(tmp_path: Path) -> None:
    path = write_config(tmp_path, promotion={"pairs": [3, 5]}, search={"budget": 8}, window={"duration": "1000s"})
    config = load_config(path)

    found = forecast(config, in_seconds(50.0, 60.0, 40.0, warm_s=70.0))

    # 990 - 7 * 50 = 640 are left, and an eighth trial needs 60 + 50 + 140 + 400.
    assert (found.trials, found.analyses, found.validation_s) == (7, (3, 5), 140 + 400)
    assert found.least_window_s == 10 + 50 + 50 + 140 + 240 + 60


def test_an_unmeasured_start_is_no_part_of_the_next_measurement() -> None:
    config = load_config(DEMO / "sloguard.yaml")
    result = dataclasses.replace(served(-80.0), warm_start_s=12.0)

    takes = durations(config, [trial(1, a_plan(Role.REFERENCE), result)], None, [])

    assert (takes.validation.seconds, takes.warm_start.seconds) == (18.0, 12.0)


@pytest.mark.parametrize(("limit_ms", "load_s"), [(500, 200 / 12), (9000, 20.0)])
def test_a_load_is_forecast_to_last_until_a_queue_would_show(tmp_path: Path, limit_ms: int, load_s: float) -> None:
    # Ten times the TTFT limit of 2 s at most.
    path = write_config(tmp_path, slo={"e2e_p99_ms": limit_ms}, workload={"requests": None})

    takes = durations(load_config(path), [], None, [])

    assert takes.trial.seconds == pytest.approx(10 + 5 + load_s, abs=0.2)
    assert takes.warm_start.seconds == pytest.approx(60 + 5 + 5)


def test_an_engine_of_its_own_for_each_trial_takes_longer(tmp_path: Path) -> None:
    forked, ordinary = (
        durations(load_config(write_config(tmp_path, engine={"forked_trials": on})), [], None, []).trial.seconds
        for on in (True, False)
    )
    assert ordinary > forked


def test_crashed_and_aborted_trials() -> None:
    config = load_config(DEMO / "sloguard.yaml")
    aborted = trial(1, a_plan(), None)
    assert aborted.status is TrialStatus.ABORTED
    assert "assumed" in durations(config, [aborted], None, []).trial.source


def test_only_drains_that_led_to_a_search_count() -> None:
    states = [(0.0, "serving"), (1.0, "draining"), (4.0, "serving"), (10.0, "draining"), (15.0, "tuning")]
    assert drains(states) == [5.0]


def test_the_edges_of_a_range_are_found() -> None:
    knob = Knob("max_num_seqs", KnobKind.INT, 4, 1024, log=True)

    def project(config: KnobValues) -> Projection:
        value = config["max_num_seqs"]
        assert isinstance(value, int)
        return Projection({"max_num_seqs": min(max(value, 7), 777)}, "")

    found = knob_plan(knob, 8, project, lambda config: f"asked {config['max_num_seqs']}", "")
    assert [(out.values, out.reason) for out in found.ruled_out] == [
        ("below 7", "asked 4"),
        ("above 777", "asked 1024"),
    ]
    none = knob_plan(knob, 8, lambda config: Projection(config, "no"), lambda _: "no", "")
    assert ([out.values for out in none.ruled_out], none.usable) == (["all"], False)


def test_cold_and_live() -> None:
    seqs, eager = KNOBS["max_num_seqs"], KNOBS["enforce_eager"]
    assert cold(seqs, (0, 32), live_trials=True) == ""
    assert cold(seqs, None, live_trials=True) == ""
    assert "0.33" in cold(seqs, (0, 33), live_trials=True)
    assert "live_trials" in cold(seqs, (0, 32), live_trials=False)
    assert cold(eager, (0, 32), live_trials=True)
