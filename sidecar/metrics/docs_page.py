"""The page docs/metrics.md: every metric of the sidecar, as its registry has them.

``python -m sidecar.metrics.docs_page`` prints it.
"""

from collections.abc import Iterable

from prometheus_client import Metric

from sidecar.config.schema import Config
from sidecar.metrics.exporter import Metrics

_HEAD = """# Metrics

What `sloguard serve` shows at `/metrics` on `metrics.host` and `metrics.port` of its file (127.0.0.1:9464). Times are
seconds, shares are ratios, moments are Unix times. A label takes the values of this table and no others, so nothing
grows with time. "serving" traffic is what users send, "trial" traffic the load of a window's trials. The histograms of
latencies have a bucket that ends at the SLO's limit. A value that is not known is NaN.

`python -m sidecar.metrics.docs_page > docs/metrics.md` writes this page; a test compares.

| metric | type | labels | what it is |
| --- | --- | --- | --- |
"""
# Labels whose values the configuration or the version gives.
_GIVEN = {
    "sloguard_build": "`version`",
    "sloguard_model": "`model`, `objective`: goodput, latency, capacity",
    "sloguard_state_reason": "`state`, `reason`: a word of the README's states",
    "sloguard_serving_configuration": "`promotion`: its number, or none; each engine argument",
    "sloguard_promoted_configuration": "`promotion`: its number, or none; each engine argument",
}
_EXAMPLE = {
    "model": "a/model",
    "slo": {"ttft_p99_ms": 500, "itl_p99_ms": 50, "e2e_p99_ms": 5000},
    "workload": {"rate": 1},
    "search": {"knobs": {"max_num_seqs": None}},
}
_SHOWN_AS = {"counter": "_total", "info": "_info"}


def metrics_page() -> str:
    """The page: the metrics of a sidecar whose SLO has all its limits, and to which nothing has happened yet."""
    return metrics_markdown(Metrics(Config.model_validate(_EXAMPLE)).registry.collect())


def metrics_markdown(families: Iterable[Metric]) -> str:
    """The page of these metrics."""
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
