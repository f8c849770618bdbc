"""The SLO: every valid limit, its display name, and what earlier versions recorded."""

import json
from pathlib import Path

import pytest
from sidecar_cases import changed, write

from sidecar.config.schema import ConfigError, load_config
from sidecar.config.slo import LATENCY_STATISTICS, LatencyKind, LatencyLimit, Slo, Statistic, within_limits

NAMES = [
    f"{kind}_{stat}_ms" for kind in ("ttft", "itl", "tpot", "e2e") for stat in ("p50", "p90", "p95", "p99", "mean")
]


def test_every_kind_and_statistic_is_a_field() -> None:
    assert [s.name for s in LATENCY_STATISTICS] == NAMES
    assert set(Slo.model_fields) == {*NAMES, "error_rate", "goodput"}


@pytest.mark.parametrize("name", NAMES)
def test_each_limit_can_be_set_alone(tmp_path: Path, name: str) -> None:
    config = load_config(write(tmp_path, changed("slo", {name: 250})))

    [limit] = config.slo.latency_limits
    assert (limit.name, limit.limit_ms) == (name, 250)
    assert config.slo.model_dump(exclude_none=True) == {name: 250, "error_rate": 0.01}


def test_a_limit_names_its_statistic() -> None:
    limit = LatencyLimit(LatencyKind.TTFT, Statistic.P95, 300.0)

    assert (limit.name, limit.label, limit.statistic.share, limit.allowed_share) == (
        "ttft_p95_ms",
        "TTFT p95",
        0.95,
        0.05,
    )
    assert LatencyLimit(LatencyKind.E2E, Statistic.MEAN, 1.0).label == "mean E2E"
    assert LatencyLimit(LatencyKind.E2E, Statistic.MEAN, 1.0).allowed_share is None


@pytest.mark.parametrize("name", ["ttft_p75_ms", "p99", "ttft_p99", "latency_p99_ms"])
def test_an_unknown_limit_gets_the_names_that_exist(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"slo.{name}: .*ttft, itl, tpot or e2e, then p50, p90, p95, p99 or mean"):
        load_config(write(tmp_path, changed("slo", {"ttft_p99_ms": 500, name: 250})))


@pytest.mark.parametrize("slo", [{}, {"error_rate": 0.02}])
def test_an_slo_without_a_latency_limit_is_refused(tmp_path: Path, slo: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="at least one latency limit is needed"):
        load_config(write(tmp_path, changed("slo", slo)))


def test_an_slo_of_p99s_is_recorded_as_earlier_versions_did() -> None:
    """Unfinished runs of earlier versions resume, and their measurements still count."""
    recorded = {"ttft_p99_ms": 500.0, "itl_p99_ms": None, "e2e_p99_ms": None, "error_rate": 0.01}

    assert json.loads(Slo(ttft_p99_ms=500).model_dump_json()) == recorded
    assert Slo.model_validate(recorded) == Slo(ttft_p99_ms=500)


def test_the_error_budget_is_the_largest_share_that_a_limit_allows() -> None:
    assert Slo(ttft_p99_ms=500, error_rate=0.001).allowed_misses == 0.01
    assert Slo(ttft_p95_ms=500, e2e_p99_ms=900).allowed_misses == 0.05
    assert Slo(e2e_mean_ms=900, error_rate=0.02).allowed_misses == 0.02


def test_a_latency_that_a_request_has_not_is_no_miss() -> None:
    limits = Slo(itl_p99_ms=50, ttft_p99_ms=500).latency_limits

    assert within_limits(limits, lambda limit: None if limit.kind is LatencyKind.ITL else 0.5)
    assert not within_limits(limits, lambda limit: 0.051 if limit.kind is LatencyKind.ITL else 0.5)


def test_goodput_is_the_share_of_requests_that_meet_every_limit(tmp_path: Path) -> None:
    slo = load_config(write(tmp_path, changed("slo", {"ttft_p90_ms": 250, "goodput": 0.95}))).slo

    assert slo.share_limits == {"error_rate": 0.01, "miss_rate": 0.05}
    assert slo.allowed_misses == 0.05
    assert slo.upper_limits == {"ttft_p90_ms": 250, "error_rate": 0.01, "miss_rate": 0.05}
    assert "goodput" not in Slo(ttft_p99_ms=1).model_dump()


@pytest.mark.parametrize(
    ("limits", "said"),
    [({"ttft_p99_ms": 250, "goodput": 1.0}, "slo.goodput"), ({"e2e_mean_ms": 250, "goodput": 0.9}, "goodput: a limit")],
)
def test_a_goodput_that_no_load_can_show_is_refused(tmp_path: Path, limits: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        load_config(write(tmp_path, changed("slo", limits)))
    assert len(str(raised.value).splitlines()) == 1
