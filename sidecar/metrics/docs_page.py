"""Generates docs/metrics.md from the registry of the sidecar.

``python -m sidecar.metrics.docs_page`` prints the page.
"""

from collections.abc import Iterable

from prometheus_client import Metric

from sidecar.config.schema import Config
from sidecar.metrics.exporter import Metrics

_HEAD = """# Metrics

The metrics of `sloguard serve`, at `/metrics` on `metrics.host` and `metrics.port` of its file (default:
127.0.0.1:9464). Durations are in seconds, shares are ratios, points in time are Unix times. Labels have only the values
in this table, so the number of series is bounded. "serving" traffic comes from users, "trial" traffic is the load of
trials. Latency histograms have a bucket boundary at each limit of the SLO. Unknown values are NaN.

`python -m sidecar.metrics.docs_page > docs/metrics.md` writes this page; a test checks that it is up to date.

| metric | type | labels | meaning |
| --- | --- | --- | --- |
"""
# Labels whose values depend on the configuration or the version.
_GIVEN = {
    "sloguard_build": "`version`",
    "sloguard_model": "`model`, `objective`: goodput, latency, capacity",
    "sloguard_state_reason": "`state`, `reason`: see the states",
    "sloguard_serving_configuration": "`promotion`: its number, or none; each engine argument",
    "sloguard_promoted_configuration": "`promotion`: its number, or none; each engine argument",
}
_EXAMPLE = {
    "model": "a/model",
    "slo": {"ttft_p99_ms": 500, "itl_p99_ms": 50, "tpot_p99_ms": 40, "e2e_p99_ms": 5000},
    "workload": {"rate": 1},
    "search": {"knobs": {"max_num_seqs": None}},
}
_SHOWN_AS = {"counter": "_total", "info": "_info"}


def metrics_page() -> str:
    """The page, for a sidecar that has just started with a p99 limit on each latency."""
    return metrics_markdown(Metrics(Config.model_validate(_EXAMPLE)).registry.collect())


def metrics_markdown(families: Iterable[Metric]) -> str:
    """The page of ``families``."""
    return _HEAD + "\n".join(sorted(_row(family) for family in families)) + "\n"


def _row(family: Metric) -> str:
    name = family.name + _SHOWN_AS.get(family.type, "")
    kind = "gauge, 0 or 1" if family.type == "stateset" else "gauge, always 1" if family.type == "info" else family.type
    return f"| `{name}` | {kind} | {_GIVEN.get(family.name) or _labels(family)} | {family.documentation} |"


def _labels(family: Metric) -> str:
    values: dict[str, dict[str, None]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            if label != "le":
                values.setdefault(label, {})[value] = None
    return "; ".join(f"`{label}`: {', '.join(found)}" for label, found in values.items())


if __name__ == "__main__":
    print(metrics_page(), end="")
