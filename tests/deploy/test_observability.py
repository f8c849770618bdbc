"""Metrics, dashboards and alerts: up to date, correct, and tested against a real sidecar.

One sidecar and one Prometheus live through a window on the fake engine for all of them. vLLM's own metrics come from
the fake engine by the names that the installed vLLM's source has; tests/real_vllm/test_closed_loop.py asks real vLLM.
"""

import importlib.util
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboard_queries import DASHBOARDS, Variables, marks, panel_queries, panels, series
from lived import REQUESTS, Lived, lived
from prometheus_server import BINARY, PrometheusServer

from sidecar.record.journal import Journal

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMTOOL = shutil.which("promtool")
NOW = Variables(interval="1s", rate_interval="10s", range="5m")

needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
needs_prometheus = pytest.mark.skipif(BINARY is None, reason="prometheus is not installed (Debian: prometheus)")
needs_sdk = pytest.mark.skipif(
    importlib.util.find_spec("grafana_foundation_sdk") is None, reason="grafana-foundation-sdk is not installed"
)


def promtool(*args: str, text: str | None = None) -> None:
    """Runs promtool in the folder of the alert rules; any error fails the test."""
    assert PROMTOOL is not None
    command, folder = [PROMTOOL, *args], DEPLOY / "prometheus"
    ran = subprocess.run(command, input=text, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert not ran.stderr, ran.stderr


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lived]:
    with lived(tmp_path_factory.mktemp("lived")) as story:
        yield story


@needs_sdk
def test_the_dashboards_are_what_the_generator_writes() -> None:
    generator = DEPLOY / "grafana" / "generate.py"
    ran = subprocess.run(
        [sys.executable, generator, "--check"], capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_stranger_is_told_what_each_panel_is(path: Path) -> None:
    shown = [panel for panel in panels(path) if panel["type"] != "row"]
    assert len(shown) > 10
    titles = [panel["title"] for panel in shown]
    assert len(set(titles)) == len(titles)
    for panel in shown:
        assert panel.get("description"), panel["title"]
        assert panel["fieldConfig"]["defaults"].get("unit"), panel["title"]
    for panel in panels(path):
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_follows_the_variables(path: Path) -> None:
    raw = Variables(job="JOB", model="MODEL", instance="INSTANCE")
    for title, query in (*panel_queries(path, raw), *((name, query) for name, _, query in marks(path, raw))):
        for selector in re.findall(r"(?:sloguard_|vllm:)\w+(\{[^}]*\})?", query):
            assert 'instance=~"INSTANCE(:[0-9]+)?"' in selector, f"{title}: {query}"
            assert 'job=~"JOB"' in selector or 'model_name=~"MODEL"' in selector, f"{title}: {query}"


def test_the_names_of_vllm_are_vllms() -> None:
    """Checked in the source of the installed vLLM: importing it takes seconds."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(found.origin).parent / "v1" / "metrics" / "loggers.py").read_text(encoding="utf-8")
    asked = {name for path in DASHBOARDS for _, q in panel_queries(path, NOW) for name in re.findall(r"vllm:\w+", q)}
    assert len(asked) > 10
    missing = [name for name in asked if f'"{re.sub("_(total|bucket)$", "", name)}"' not in source]
    assert not missing


@needs_promtool
def test_prometheus_takes_the_scrape_file_and_the_rules() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "--lint-fatal", "alerts.yml")


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", "alerts_test.yml")


@needs_promtool
@needs_prometheus
def test_the_metrics_of_a_sidecar_that_has_run_a_window_are_clean(story: Lived) -> None:
    page = story.metrics()
    assert "sloguard_windows_total" in page
    promtool("check", "metrics", text=page)


@needs_prometheus
@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_shows_data(story: Lived, path: Path) -> None:
    def has_numbers(panel: dict[str, Any], target: dict[str, Any]) -> bool:
        query, instant = NOW.into(target["expr"]), bool(target.get("instant"))
        assert panel["type"] in ("bargauge", "table") or not instant
        # Panels with the latest value need a number now; a busy machine may have missed a scrape.
        for _ in range(30):
            end = time.time()
            if series(story.prometheus.url, query, end if instant else story.began, end, 1.0):
                return True
            story.prometheus.wait_until_up()
            time.sleep(0.5)
        return False

    asked = [(panel, target) for panel in panels(path) for target in panel.get("targets", [])]
    assert len(asked) > 20
    empty = [f"{panel['title']}: {target['expr']}" for panel, target in asked if not has_numbers(panel, target)]
    assert not empty
    for name, _, query in marks(path, NOW):
        assert series(story.prometheus.url, query, story.began, time.time(), 1.0), name


@needs_prometheus
def test_the_data_are_what_has_happened(story: Lived) -> None:
    story.prometheus.wait_until_up()

    def by(label: str, query: str) -> dict[str, float]:
        found = story.prometheus.query(query)
        return {s["metric"][label]: float(s["value"][1]) for s in found if float(s["value"][1])}

    # A baseline, two unguarded trials that crash, two or more of the search; then two pairs.
    trials = by("status", "sloguard_trials_total")
    assert trials["crashed"] == 2
    assert trials["feasible"] >= 4
    assert by("outcome", "sloguard_windows_total") == {"promoted": 1}
    assert by("category", 'sloguard_crashes_total{traffic="trial"}') == {"out_of_memory": 1, "engine_death": 1}
    assert by("category", 'sloguard_crashes_total{traffic="serving"}') == {"engine_death": 2}
    assert by("verdict", "sloguard_rollbacks_total") == {"crash_loop": 1}
    assert by("reason", "sloguard_engine_restarts_total") == {"engine_crashed": 2}
    assert by("reason", "sloguard_engine_planned_restarts_total") == {"promoted": 1}
    assert "batch-prompt" in by("rule", "sloguard_repairs_total")
    # After the rollback, the requests under the file's arguments are counted from 0.
    (serves,) = story.prometheus.query("sloguard_serving_configuration_info")
    assert (serves["metric"]["promotion"], serves["metric"]["max_num_seqs"]) == ("none", "2")
    judged, missed = (by("objective", f"sloguard_slo_{what}_total") for what in ("requests", "misses"))
    assert judged["any"] > 0
    (not_judged,) = story.prometheus.query(f'{REQUESTS} - scalar(sloguard_slo_requests_total{{objective="any"}})')
    assert float(not_judged["value"][1]) >= story.served_before > 0
    # Slow requests take 4 x 0.3 s, a third of it until the first token.
    assert 0 < missed["e2e"] < judged["e2e"] / 2
    assert "ttft" not in missed
    # Every second of the window is accounted for.
    spent = sum(by("activity", "sloguard_window_spent_seconds_total").values())
    states = Journal(story.config.state, read_only=True).states()
    opened = next(s.at for s in states if s.state == "draining")
    back = next(s.at for s in states if s.state == "serving" and s.at > opened)
    assert spent == pytest.approx(back - opened, abs=3)


@needs_prometheus
def test_a_count_of_problems_tells_none_from_no_data(story: Lived) -> None:
    """A sidecar that is not scraped must not look like one without problems."""
    story.prometheus.wait_until_up()
    [expr] = [query for title, query in panel_queries(DASHBOARDS[1], NOW) if title == "Engine crashes"]
    without = expr.replace('traffic="serving"', 'traffic="of nobody"')
    elsewhere = expr.replace('job=~".+"', 'job=~"not scraped"')
    now = time.time()

    [none] = series(story.prometheus.url, without, now, now, 1.0)
    assert (none.labels["category"], none.values) == ("none", (0.0,))
    assert series(story.prometheus.url, elsewhere, now, now, 1.0) == []
    assert {s.labels["category"] for s in series(story.prometheus.url, expr, now, now, 1.0)} == {"engine_death"}


COMPARISON = re.compile(r"\s(==|>=|>)\s[\d.]+")
OPERATOR = re.compile(r"\b(?:and|unless|or)\b(?: on \([^)]*\))?")


@needs_prometheus
def test_every_rule_has_something_to_compare(story: Lived) -> None:
    story.prometheus.wait_until_up()
    rules = story.prometheus.rules()
    assert {rule["health"] for rule in rules} == {"ok"}
    written = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    assert len(rules) == sum(len(group["rules"]) for group in written)
    for rule in (rule for group in written for rule in group["rules"]):
        if "record" in rule:
            assert numbers(story.prometheus, rule["record"]), rule["record"]
            continue
        operands = [text.strip() for text in OPERATOR.split(COMPARISON.sub("", rule["expr"])) if "absent" not in text]
        for operand in operands:
            assert numbers(story.prometheus, operand), f"{rule['alert']}: {operand}"
        # Except for series that excuse an alert, or exist without a problem.
        whole = re.split(r"\bunless\b|\bor\b", COMPARISON.sub("", rule["expr"]))[0]
        assert numbers(story.prometheus, whole), f"{rule['alert']}: {whole}"
    firing = {rule["name"] for rule in rules if rule["type"] == "alerting" and rule["state"] == "firing"}
    assert firing <= {"SloguardRolledBack", "SloguardSloBurnsFast", "SloguardSloBurnsSlowly"}
    assert "SloguardRolledBack" in firing


def numbers(prometheus: PrometheusServer, query: str) -> list[float]:
    values = [float(sample["value"][1]) for sample in prometheus.query(query)]
    return [value for value in values if math.isfinite(value)]


@needs_prometheus
def test_the_dashboards_can_be_previewed(story: Lived, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    command = [sys.executable, DEPLOY / "grafana" / "preview.py", "--prometheus", story.prometheus.url]
    minutes = math.ceil((time.time() - story.began) / 60)
    command += ["--minutes", str(minutes), "--scrape-s", "1", "-o", tmp_path]
    subprocess.run(command, check=True, timeout=300)

    for path in DASHBOARDS:
        page = (tmp_path / f"{path.stem}.html").read_text(encoding="utf-8")
        assert "No data" not in page
        assert page.count("Plotly.newPlot(") >= 10
