"""What a reader does with the report in Chromium: jump, copy, sort, print; and whether it is accessible."""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chromium_tab import serious_violations
from report_cases import Made, only_crashes, whole

from sidecar.measure.capacity_search import RateResult
from sidecar.record import run_snapshot
from sidecar.report.page import report_page
from sidecar.report.plots import plots
from sidecar.report.view_model import ReportView, report_view

if TYPE_CHECKING:
    from playwright.sync_api import Page

MAX_BYTES = 1_500_000
MAX_PRINTED_PAGES = 5


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> ReportView:
    return report_view(run_snapshot.read_run(whole(tmp_path_factory.mktemp("forty"))))


def opened(tab: "Page", view: ReportView, folder: Path) -> int:
    """Opens the report; returns its size."""
    path = folder / "report.html"
    path.write_text(report_page(view), encoding="utf-8")
    tab.goto(f"file://{path}")
    return path.stat().st_size


def test_the_report_is_small_and_its_contents_list_is_valid(forty: ReportView, tab: "Page", tmp_path: Path) -> None:
    assert opened(tab, forty, tmp_path) < MAX_BYTES
    links = tab.eval_on_selector_all("nav a", "links => links.map(link => link.hash.slice(1))")

    assert links == ["evidence", "trials", "objective", "latencies", "limits", "knobs", "importance", "crashes", "time",
                     "repairs", "versions", "commands", "words"]  # fmt: skip
    assert tab.evaluate("links => links.filter(id => !document.getElementById(id))", links) == []


def test_a_command_is_copied(forty: ReportView, tab: "Page", tmp_path: Path) -> None:
    opened(tab, forty, tmp_path)
    tab.evaluate(
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async text => { copied = text; }}})"
    )
    tab.click("#decision .copy")
    tab.wait_for_function("document.querySelector('#decision .copy').textContent === 'copied'")

    assert forty.outcome.serve is not None
    assert tab.evaluate("copied") == forty.outcome.serve.line


def test_trials_are_sorted_by_a_column(forty: ReportView, tab: "Page", tmp_path: Path) -> None:
    opened(tab, forty, tmp_path)
    numbers = "bodies => bodies.map(body => Number(body.querySelector('td').textContent))"

    def order(column: str) -> list[float | None]:
        tab.click(f".trials th button:text-is('{column}')")
        values = {entry.number: entry.value for entry in forty.entries}
        return [values[n] for n in tab.eval_on_selector_all(".trials tbody", numbers)]

    rising = order("mean E2E latency")
    known = [value for value in rising if value is not None]
    assert known == sorted(known)
    assert rising == [*known, *[None] * (len(rising) - len(known))]  # trials without a value come last
    assert tab.get_attribute(".trials th:nth-child(4)", "aria-sort") == "ascending"
    falling = order("mean E2E latency")
    assert falling[: len(known)] == known[::-1]
    assert falling[len(known) :] == rising[len(known) :]


@pytest.mark.parametrize("trials", [40, 120])
def test_it_prints_on_few_pages(tab: "Page", tmp_path: Path, trials: int) -> None:
    assert opened(tab, report_view(run_snapshot.read_run(whole(tmp_path / "run", trials))), tmp_path) < MAX_BYTES
    tab.evaluate("redraw(690)")
    printed = tab.pdf(prefer_css_page_size=True)

    assert len(re.findall(rb"/Type\s*/Page\b", printed)) <= MAX_PRINTED_PAGES


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("case", ["promoted", "crashes"])
def test_axe_finds_nothing_serious(tab: "Page", tmp_path: Path, case: str, scheme: str) -> None:
    state = whole(tmp_path / "run", 24) if case == "promoted" else only_crashes(tmp_path / "run")
    tab.emulate_media(color_scheme=scheme)  # pyright: ignore[reportArgumentType]
    opened(tab, report_view(run_snapshot.read_run(state)), tmp_path)

    assert serious_violations(tab) == []


@pytest.mark.parametrize("objective", ["latency", "goodput"])
def test_a_crash_is_never_at_a_good_place(tmp_path: Path, objective: str) -> None:
    view = report_view(run_snapshot.read_run(whole(tmp_path, 30, objective=objective)))
    data = plots(view)["objective"].figure.data
    crashed = [y for trace in data if trace.name == "crashed" for y in trace.y]
    measured = [y for trace in data if trace.name in ("feasible", "infeasible", "candidate") for y in trace.y]

    assert crashed
    if objective == "latency":
        assert min(crashed) > max(measured)
    else:
        assert max(crashed) < min(measured)


def test_latencies_have_their_p99_and_n(forty: ReportView) -> None:
    names = {trace.name for trace in plots(forty)["answers"].figure.data if trace.name}
    starts = len(forty.verdict.incumbents)

    assert all(re.fullmatch(rf"(incumbent|candidate): p99 [\d,]+ ms, n = {200 * starts:,}", name) for name in names)
    assert len(names) == 2


def test_loads_at_several_rates_have_a_capacity_curve(tab: "Page", tmp_path: Path) -> None:
    made = Made(tmp_path / "run", objective="capacity")
    made.search(6, crashes=False)
    rates = (RateResult(8, True, 0.6), RateResult(16, False, 1.8), RateResult(11.3, True, 0.9))
    for trial in made.rows[1:]:
        assert trial.result is not None
    made.rows = [
        dataclasses.replace(t, result=dataclasses.replace(t.result, tried=rates)) for t in made.rows if t.result
    ]
    view = report_view(run_snapshot.read_run(made.close()))
    opened(tab, view, tmp_path)

    line = plots(view)["capacity"].figure.data[0]
    assert (list(line.x), list(line.y)) == ([8, 11.3, 16], [0.6, 0.9, 1.8])
    assert tab.locator("#plot-capacity .trace").count() > 0


def test_the_machine_is_always_recorded(forty: ReportView, tmp_path: Path) -> None:
    kept = report_view(run_snapshot.read_run(whole(tmp_path, 4)))
    for view in (forty, kept):
        assert [fact.value for fact in view.versions if fact.name == "device"] == ["NVIDIA H200"]
