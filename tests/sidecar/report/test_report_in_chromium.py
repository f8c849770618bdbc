"""The report in headless Chromium: what it draws, and that it makes no requests."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_cases import INCUMBENT, Made, only_crashes, whole

from sidecar.record import run_snapshot
from sidecar.report.page import report_page
from sidecar.report.view_model import report_view
from vllm_sloguard.crash import Category

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium"),
]
# Collects console errors, drawn plots and requests in the page.
PROBE = """
<script>
const seen = {errors: [], violations: []};
addEventListener("error", event => seen.errors.push(String(event.message)), true);
addEventListener("unhandledrejection", event => seen.errors.push(String(event.reason)));
addEventListener("securitypolicyviolation", event => seen.violations.push(event.blockedURI));
console.error = (...words) => seen.errors.push(words.join(" "));
</script>
"""
REPORT = """
<script>
setTimeout(() => {
  seen.title = document.title;
  seen.plots = Object.fromEntries([...document.querySelectorAll(".plot")].map(place => [place.id.slice(5), {
    svgs: place.querySelectorAll(".main-svg").length,
    marks: place.querySelectorAll(".trace path, .bars path, .scatterlayer path").length,
    over: place.querySelector(".main-svg").getBoundingClientRect().right - innerWidth,
  }]));
  seen.fetched = performance.getEntriesByType("resource").map(entry => entry.name);
  seen.over = document.documentElement.scrollWidth - innerWidth;
  const box = document.createElement("div");
  box.id = "probe";
  box.textContent = JSON.stringify(seen);
  document.body.append(box);
}, 1500);
</script>
"""


def opened(state: Path, folder: Path, width: int = 1280) -> dict[str, object]:
    text = report_page(report_view(run_snapshot.read_run(state)))
    assert "<head>\n" in text
    probed = text.replace("<head>\n", f"<head>\n{PROBE}", 1).replace("</body>", f"{REPORT}</body>")
    (folder / "report.html").write_text(probed, encoding="utf-8")
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", f"--window-size={width},900",
        "--dump-dom", f"file://{folder / 'report.html'}",
    ]  # fmt: skip
    dumped = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500).stdout
    found = re.search(r'<div id="probe">(.*?)</div>', dumped, re.DOTALL)
    assert found is not None, dumped[-2000:]
    seen: dict[str, object] = json.loads(html.unescape(found[1]))
    assert seen["errors"] == []
    assert seen["violations"] == []
    assert seen["fetched"] == []
    assert isinstance(seen["over"], int | float)
    assert seen["over"] <= 0, "the page is wider than the window"
    return seen


def drawn(seen: dict[str, object]) -> set[str]:
    """The plots; each must show something and fit."""
    plots = seen["plots"]
    assert isinstance(plots, dict)
    for name, plot in plots.items():  # pyright: ignore[reportUnknownVariableType]
        assert plot["svgs"] >= 1, name
        assert plot["marks"] >= 1, name
        assert plot["over"] <= 0, name
    return set(plots)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


@pytest.mark.parametrize("width", [1280, 500])  # chromium makes no narrower window without a screen
def test_every_plot_is_drawn(tmp_path: Path, width: int) -> None:
    seen = opened(whole(tmp_path / "run"), tmp_path, width)

    assert drawn(seen) == {
        "gain", "objective", "answers", "percentiles", "limits", "knobs", "importance", "crashes", "time"
    }  # fmt: skip


def test_500_trials_are_drawn(tmp_path: Path) -> None:
    seen = opened(whole(tmp_path / "run", 500), tmp_path)

    assert {"objective", "limits", "knobs", "crashes"} <= drawn(seen)


def test_only_crashes_are_drawn(tmp_path: Path) -> None:
    assert drawn(opened(only_crashes(tmp_path / "run"), tmp_path)) == {"knobs", "crashes", "time"}


def test_a_script_in_a_crash_is_not_run(tmp_path: Path) -> None:
    evil = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
    made = Made(tmp_path / "run")
    made.search(3, crashes=False)
    for seqs in (5, 6):
        made.crash({**INCUMBENT, "max_num_seqs": seqs}, Category.STARTUP_FAILURE, f"{evil} {seqs}")

    seen = opened(made.close(), tmp_path)

    assert drawn(seen)
    assert "owned" not in str(seen["title"])
