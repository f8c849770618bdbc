"""The page in headless Chromium, with hand-written records and in a real window on the fake engine."""

import json
import re
import signal
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chromium_tab import serious_violations
from fake_service import await_state, fake_config, serving
from fake_vllm import OUT_OF_MEMORY
from own_ports import own_port
from page_bench import OOM, PageBench, measured, page_bench, page_config, result

from sidecar.config.schema import Config, load_config
from sidecar.record.decisions import Decision, Outcome
from sidecar.record.events import EventKind, Operations
from sidecar.record.journal import Journal
from sidecar.record.states import State
from sidecar.record.trial import Result, Role
from sidecar.record.wording import OUTCOMES

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


def opened(tab: "Page", url: str) -> None:
    tab.goto(url)
    tab.wait_for_selector("#state:not([hidden])")


def wait_for_text(tab: "Page", selector: str, text: str) -> None:
    """Waits until the element contains ``text``."""
    shown = f"document.querySelector('{selector}')?.textContent.includes({json.dumps(text)})"
    tab.wait_for_function(f"() => {shown}")


def confirm(tab: "Page", name: str, token: str = "") -> None:
    """Presses a button and confirms."""
    tab.click(f"#{name}")
    if token:
        tab.fill("#ask-token", token)
    tab.click("#ask-yes")


def test_trials_appear_as_they_are_recorded(bench: PageBench, tab: "Page") -> None:
    opened(tab, bench.url)
    wait_for_text(tab, "#word", "serving")
    assert not tab.is_visible("#abort")

    run = bench.tune(600)
    bench.tried(run, Role.BASELINE, "baseline", result(measured(ttft_ms=2500), violation=0.2))
    bench.tried(run, Role.UNGUARDED, "unguarded", Result(crash=OOM))
    bench.begin(run, Role.SEARCH, "anneal", max_num_seqs=23)
    wait_for_text(tab, "#word", "tuning")
    wait_for_text(tab, "#trials", "running")  # the last record
    wait_for_text(tab, "#steps [aria-current=step]", "Search2 of 10 trials")
    assert "╌ level of the incumbent" in tab.inner_text("#chart .legend")
    assert re.search(
        r"Started (\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d (UTC|GMT\S*|[A-Z]{3,4})\. ", tab.inner_text("#run-about")
    )
    rows = tab.locator("#trials tr").all_inner_texts()
    verdicts = ("running", "crashed", "infeasible")
    assert [next(word for word in verdicts if word in row) for row in rows] == list(verdicts)
    assert "out of memory" in rows[1]
    assert "CUDA out of memory. Tried to allocate 2.00 GiB." in rows[1]
    assert "✗ 2500 ms" in rows[2]
    assert tab.title() == "tuning · sloguard"
    left = tab.text_content("#facts")
    tab.wait_for_function("before => document.getElementById('facts').textContent !== before", arg=left)


def test_live_latencies_against_the_slo(bench: PageBench, tab: "Page") -> None:
    bench.hub.expect("one")
    bench.requests.engine_id = "one"
    opened(tab, bench.url)
    wait_for_text(tab, "#traffic", "not reported any request")
    bench.tell("one", *[(2500.0, 20.0, 2900.0)] * 4)
    wait_for_text(tab, "#live", "✗ 2500 ms")
    wait_for_text(tab, "#live", "limit 2000 ms")
    wait_for_text(tab, "#traffic", "4 (100.0 %) missed the SLO")
    bench.tell("one", *[(100.0, 20.0, 900.0)] * 996)
    wait_for_text(tab, "#live", "✓ 100 ms")


def test_recorded_text_is_escaped(bench: PageBench, tab: "Page") -> None:
    bad = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    run = bench.tune(600)
    bench.begin(run, Role.VALIDATION, bad, reason=bad)
    bench.journal.end_run(run.id, Decision(Outcome.KEPT, bad))
    opened(tab, bench.url)
    bench.enter(State.RESTORING, bad)
    wait_for_text(tab, "#why", bad)
    assert tab.locator("img, main script").count() == 0
    assert tab.title() == "restoring · sloguard"
    assert bad in tab.inner_text("#trials")
    assert tab.inner_text("#outcome") == OUTCOMES[Outcome.KEPT]


def test_steps_of_a_window(bench: PageBench, tab: "Page") -> None:
    run = bench.tune(600)
    bench.tried(run, Role.BASELINE, "baseline", result(measured()))
    opened(tab, bench.url)
    wait_for_text(tab, "#steps [aria-current=step]", "about ")
    assert tab.locator("#steps li").all_inner_texts()[2:] == ["Validate", "Restore"]
    assert re.search(r"by \d\d:\d\d:\d\d \S+( \(\d\d:\d\d UTC\))? at the latest", tab.inner_text("#back-by"))
    bench.enter(State.VALIDATING, "the search is over")
    bench.tried(run, Role.REFERENCE, "reference", result(measured()))
    wait_for_text(tab, "#steps [aria-current=step]", "Validate1 of 6 starts")
    assert tab.locator("#steps .done").count() == 2


def test_arguments_are_collapsed_and_documents_are_linked(bench: PageBench, tab: "Page") -> None:
    opened(tab, bench.url)
    assert not tab.is_visible("#changes")
    tab.click("#arguments-head")
    assert tab.is_visible("#changes")
    assert tab.eval_on_selector_all("nav a", "links => links.map(link => link.pathname)") == ["/report", "/history"]


def test_times_are_local_and_utc(browser: "Browser", bench: PageBench) -> None:
    bench.operations.record(EventKind.PAUSED, reason="")
    context = browser.new_context(timezone_id="Asia/Kolkata", locale="en-GB")
    page = context.new_page()
    opened(page, bench.url)
    text = page.inner_text("#paused")
    found = re.search(r"(\d\d):(\d\d):\d\d \S+ \((\d\d):(\d\d) UTC\)", text)
    context.close()

    assert found is not None, text
    local, utc = (60 * int(found[n]) + int(found[n + 1]) for n in (1, 3))
    assert (local - utc) % 1440 == 330


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(bench: PageBench, tab: "Page", scheme: str) -> None:
    tab.emulate_media(color_scheme=scheme)  # pyright: ignore[reportArgumentType]
    opened(tab, bench.url)
    assert serious_violations(tab) == []
    run = bench.tune(600)
    bench.tried(run, Role.BASELINE, "baseline", result(measured(ttft_ms=2500), violation=0.2))
    bench.tried(run, Role.SEARCH, "anneal", Result(crash=OOM))
    bench.journal.end_run(run.id, Decision(Outcome.INCONCLUSIVE, "noise", gain=0.1, low=-0.1, high=0.3))
    wait_for_text(tab, "#decided", "inconclusive")
    tab.click("#abort")
    assert serious_violations(tab) == []


def test_a_crash_is_never_at_a_good_place(bench: PageBench, tab: "Page") -> None:
    run = bench.tune(600)
    bench.tried(run, Role.BASELINE, "baseline", result(measured()))
    bench.tried(run, Role.SEARCH, "anneal", Result(crash=OOM))
    opened(tab, bench.url)
    wait_for_text(tab, "#trials", "crashed")
    heights = "marks => marks.map(mark => mark.parentElement.transform.baseVal[0].matrix.f)"
    [incumbent, crashed] = tab.eval_on_selector_all("#chart .mark", heights)
    assert crashed < incumbent  # higher up: a longer latency


def test_a_focused_field_does_not_cut_its_label(bench: PageBench, tab: "Page") -> None:
    opened(tab, bench.url)
    tab.click("#pause")
    for name in ("ask-reason", "ask-token"):
        tab.focus(f"#{name}")
        gap = "label.getBoundingClientRect().bottom - label.nextElementSibling.getBoundingClientRect().top"
        assert tab.eval_on_selector(f"[for={name}]", f"label => -({gap})") >= 5  # the ring and its offset


def test_a_lost_connection_is_shown_and_restored(tmp_path: Path, tab: "Page") -> None:
    config_file = page_config(tmp_path)
    with page_bench(config_file) as bench:
        bench.serve("the sidecar has started; it is up")
        opened(tab, bench.url)
        assert tab.is_enabled("#pause")
    wait_for_text(tab, "#lost", "Connection lost since")
    assert tab.is_disabled("#pause")
    assert tab.text_content("#word") == "serving"
    with page_bench(config_file) as bench:
        bench.serve("took over the engine of an earlier sidecar")
        wait_for_text(tab, "#why", "took over the engine of an earlier sidecar")
        assert not tab.is_visible("#lost")
        assert tab.is_enabled("#pause")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits(bench: PageBench, tab: "Page", width: int, scheme: str) -> None:
    run = bench.tune(600)
    for ended in (Result(crash=OOM), result(measured()), result(measured(ttft_ms=2500, mean_ms=None), violation=0.2)):
        bench.tried(run, Role.SEARCH, "anneal", ended, max_num_seqs=8, kv_cache_memory_bytes=2**46)
    tab.set_viewport_size({"width": width, "height": 900})
    tab.emulate_media(color_scheme=scheme)  # pyright: ignore[reportArgumentType]
    opened(tab, bench.url)
    wait_for_text(tab, "#trials", "crashed")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in back.removeprefix("rgb(").removesuffix(")").split(","))
    assert (brightness > 600) is (scheme == "light")


def test_a_window_its_buttons_and_another_sidecar(tmp_path: Path, tab: "Page") -> None:
    page = {"enabled": True, "port": own_port()}
    knobs = {"max_num_seqs": {"low": 4, "high": 12}}
    search = {"budget": 30, "knobs": knobs, "unguarded": [{"max_num_seqs": OUT_OF_MEMORY}]}
    config_file = fake_config(tmp_path, page=page, search=search)
    config = load_config(config_file)
    url = f"http://127.0.0.1:{page['port']}"
    with serving(config_file, FAKE_LOAD_S="0.3") as service:
        token = (config.state / "page.token").read_text().strip()
        opened(tab, url)
        wait_for_text(tab, "#word", "serving")

        # Paused, by a wrong token first.
        confirm(tab, "pause", "0" * 32)
        wait_for_text(tab, "#ask-problem", "a valid token is needed")
        assert paused(config) is None
        tab.fill("#ask-token", token)
        tab.fill("#ask-reason", "a look at it")
        tab.click("#ask-yes")
        wait_for_text(tab, "#message", "paused: no window will open")
        wait_for_text(tab, "#paused", "a look at it. No window opens meanwhile.")
        assert paused(config) == "a look at it"
        confirm(tab, "resume")  # the tab keeps the token
        wait_for_text(tab, "#message", "resumed: windows can open again")
        tab.wait_for_selector("#paused", state="hidden")
        assert paused(config) is None

        # A window, aborted once it has trials.
        wait_for_text(tab, "#facts", "Next windownone scheduled")
        tab.click("#retune")
        wait_for_text(tab, "#ask-text", "vLLM stops serving for up to ")
        tab.click("#ask-yes")
        wait_for_text(tab, "#message", "a window is requested")
        wait_for_text(tab, "#word", "tuning")
        wait_for_text(tab, "#steps [aria-current=step]", "Search")
        wait_for_text(tab, "#back-by", "at the latest")
        assert not tab.is_visible("#retune")
        wait_for_text(tab, "#facts", "Window time left")
        wait_for_text(tab, "#trials", "out of memory")
        wait_for_text(tab, "#trials", "feasible")
        confirm(tab, "abort")
        wait_for_text(tab, "#message", "the window is aborted")
        wait_for_text(tab, "#word", "serving")
        wait_for_text(tab, "#last-window", "aborted, no change")
        assert not tab.is_visible("#steps")
        wait_for_text(tab, "#decided", "The run ended before its decision.")

        service.send_signal(signal.SIGTERM)
        assert service.wait(120) == 0
        wait_for_text(tab, "#lost", "Connection lost since")
        # Another sidecar takes the running engine over; the same tab continues with the new epoch.
        with serving(config_file) as again:
            wait_for_text(tab, "#why", "took over the engine of an earlier sidecar")
            assert not tab.is_visible("#lost")
            confirm(tab, "pause")
            wait_for_text(tab, "#message", "paused: no window will open")
            wait_for_text(tab, "#paused", "No window opens meanwhile.")
            await_state(config.state, "serving", again)
            assert paused(config) == ""


def paused(config: Config) -> str | None:
    """The reason of the pause in the journal; None if not paused."""
    with closing(Journal(config.state, read_only=True)) as journal:
        event = Operations(journal, config.base_digest()).paused()
    return event and event.reason
