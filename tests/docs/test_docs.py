"""The pages under docs/ agree with the code: generated ones are fresh, and the example's numbers are computed."""

# ruff: noqa: RUF001 - the signs of the page

import importlib.util
import math
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from sidecar_cases import configured, measured, planned, trial

from sidecar.config.schema import Config
from sidecar.config.window import Probation, Promotion
from sidecar.measure.capacity_search import TOLERANCE
from sidecar.promote import decision as promotion
from sidecar.promote import statistics
from sidecar.promote.interim_analysis import MIN_CHANCE, MISS_SHARE
from sidecar.promote.probation import FALSE_ALARMS, exceedance_tail
from sidecar.record.decisions import Outcome
from sidecar.record.trial import Result, Role, Trial
from sidecar.record.wording import OUTCOMES
from vllm_sloguard.crash import Category
from vllm_sloguard.crash.crash_rules import CRASH_RULES
from vllm_sloguard.knobs import KNOBS
from vllm_sloguard.latency import nearest_rank

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DECISION = (DOCS / "decision.md").read_text(encoding="utf-8")
FLAT = " ".join(DECISION.split())


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "generate.py", "--check"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_every_knob_and_every_category_has_its_part() -> None:
    knobs, crashes = ((DOCS / name).read_text(encoding="utf-8") for name in ("knobs.md", "crashes.md"))
    assert re.findall(r"^## (.*)$", knobs, re.MULTILINE) == [*KNOBS, "Adding a knob"]
    assert re.findall(r"^## (\w+)$", crashes, re.MULTILINE)[: len(Category)] == [str(c) for c in Category]
    for part in crashes.split("\n## ")[1 : len(Category) + 1]:
        assert "**What the sidecar does.** " in part
        assert "\n### " in part


def test_the_links_of_diagnose_lead_to_headings() -> None:
    crashes = (DOCS / "crashes.md").read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#{2,3} (.*)$", crashes, re.MULTILINE)
    }
    assert {rule.anchor for rule in CRASH_RULES} | {str(category) for category in Category} <= headings


# The example of decision.md.

INCUMBENT, CANDIDATE = "incumbent", "candidate"


def example() -> dict[str, list[tuple[float, float]]]:
    """Mean latency and TTFT p99 of each start, as the page's table has them."""
    rows = re.findall(r"^\| \d \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", DECISION, re.MULTILINE)
    numbers = [tuple(map(float, row)) for row in rows]
    return {INCUMBENT: [(r[0], r[1]) for r in numbers], CANDIDATE: [(r[2], r[3]) for r in numbers]}


def run_of(config: Config, candidates_ms: list[float]) -> list[Trial]:
    """A search of two trials, and the pairs of the example in the order in which they are asked for."""

    def started(number: int, role: Role, ms: float, ttft_ms: float) -> Trial:
        result = Result(value=-ms, measurement=replace(measured(ttft_ms, e2e_mean_ms=ms), requests=200))
        seqs = 8 if role in (Role.BASELINE, Role.REFERENCE) else 24
        return trial(number, planned(role, max_num_seqs=seqs), result)

    starts = example()
    left: dict[Role, list[Any]] = {
        Role.REFERENCE: list(starts[INCUMBENT]),
        Role.VALIDATION: [(ms, ttft) for ms, (_, ttft) in zip(candidates_ms, starts[CANDIDATE], strict=True)],
    }
    trials = [started(1, Role.BASELINE, 806.0, 455.0), started(2, Role.SEARCH, 700.0, 398.0)]
    while any(left.values()):
        role = promotion.next_role(trials, config)
        assert role is not None
        trials.append(started(len(trials) + 1, role, *left[role].pop(0)))
    return trials


def test_the_example_s_decision(tmp_path: Path) -> None:
    config = configured(tmp_path)
    trials = run_of(config, [ms for ms, _ in example()[CANDIDATE]])
    decision = promotion.decide(trials, config)
    assert decision.outcome is Outcome.PROMOTED
    assert f'"{OUTCOMES[decision.outcome]}: {decision.reason}"' in FLAT
    # The order is that of the page: incumbent, candidate, candidate, incumbent.
    assert [t.plan.role for t in trials[2:6]] == [Role.REFERENCE, Role.VALIDATION, Role.VALIDATION, Role.REFERENCE]


def test_the_example_s_other_candidate_is_measured_again(tmp_path: Path) -> None:
    config = configured(tmp_path)
    trials = run_of(config, [650.0, 731.0, 790.0])
    assert promotion.next_role(trials, config) is not None
    ours, theirs = [-math.log(ms) for ms, _ in example()[INCUMBENT]], [-math.log(ms) for ms in (650, 731, 790)]
    plan, error = config.promotion.pairs, 0.9 * (1 - config.promotion.confidence)
    found = statistics.compare(ours, theirs, statistics.error_level(error, plan, 3, last=False), floor=0.01)
    share = [1 - math.exp(-log) for log in (found.log_ratio, found.low, found.high)]
    final = statistics.error_level(error, plan, plan[-1], last=True)
    chance = statistics.chance_of_success(found, 3 / plan[-1], final, -math.log1p(-config.promotion.min_gain))
    assert f"gain {share[0]:+.1%}, from {share[1]:+.1%} to {share[2]:+.1%}" in FLAT
    assert f"a chance of {chance:.0%}, and ask for more pairs" in FLAT
    assert "650, 731 and 790 ms" in FLAT


def test_the_example_s_arithmetic(tmp_path: Path) -> None:
    config = configured(tmp_path)
    rule = config.promotion
    starts = example()
    logs = [[-math.log(ms) for ms, _ in starts[side]] for side in (INCUMBENT, CANDIDATE)]
    deviations = [float(np.std(side, ddof=1)) for side in logs]
    allowed = (1 - rule.confidence) * (1 - MISS_SHARE)
    levels = [statistics.error_level(allowed, rule.pairs, n, last=n == rule.pairs[-1]) for n in rule.pairs]
    found = statistics.compare(logs[0], logs[1], levels[0], floor=rule.noise)
    share = [1 - math.exp(-log) for log in (found.log_ratio, found.low, found.high)]
    limit = (1 - rule.slo_confidence) / len(rule.pairs)
    excess = [(ttft - 500) / 500 for _, ttft in starts[CANDIDATE]]
    bounds = statistics.confidence_bounds(excess, limit)
    reach = (bounds[1] - float(np.mean(excess))) / (float(np.std(excess, ddof=1)) / math.sqrt(3))
    for text in (
        f"α = 0.9 · (1 − 0.98) · (3 / 16)² = {levels[0]:.5f}",
        f"α is {levels[0]:.5f}, {levels[1]:.4f}, {levels[2]:.4f}, {levels[3]:.4f} and {levels[4]:.4f} after",
        f"are {deviations[0]:.4f} and {deviations[1]:.4f}, both below `noise`",
        f"SE = √(0.01² / 3 + 0.01² / 3) = {found.standard_error:.5f}, ν = {found.freedom:.1f},",
        f"t = {(found.high - found.log_ratio) / found.standard_error:.3f}",
        f"d = {found.log_ratio:.4f}; low, high = {found.low:.4f}, {found.high:.4f}",
        f"p = {found.p_value:.5f}",
        f"{share[0]:.1%} are saved, between {share[1]:.1%} and {share[2]:.1%}",
        f"m = {', '.join(f'−{-m:.3f}' for m in excess)}; α = (1 − 0.9) / 5 = {limit:.2f}, t(2) = {reach:.3f}",
        f"the upper bound of the mean is −{-bounds[1]:.3f} ≤ 0",
        f"600 requests ≥ {rule.requests_for_p99}",
        f"which is {rule.requests_for_p99} at 0.9",
        f"ln 1.1 / √12 = {math.log(TOLERANCE) / math.sqrt(12):.4f}",
        f"Below {statistics.PAIRED_FROM} pairs it is Welch",
        f"is below {MIN_CHANCE:.0%}",
    ):
        assert text in FLAT, text
    assert max(deviations) < rule.noise


def test_the_thresholds_of_probation() -> None:
    for reference, count in ((1000, 37), (200, 79)):
        beyond = reference - nearest_rank(reference, 0.99)
        level = FALSE_ALARMS / 120
        assert (
            exceedance_tail(count, 1000, beyond, reference)
            < level
            < exceedance_tail(count - 1, 1000, beyond, reference)
        )
    assert "it takes 37 above the p99 of 1,000 of the incumbent's, but 79 above that of 200" in FLAT
    assert "below 0.005 / 120" in FLAT
    assert FALSE_ALARMS == 0.005


# What a formatter of paragraphs breaks.

PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def blocks(text: str) -> tuple[list[list[str]], list[str]]:
    """The fenced blocks of a page, line by line, and the lines outside them."""
    fenced: list[list[str]] = []
    outside: list[str] = []
    inside = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
            if inside:
                fenced.append([])
        elif inside:
            fenced[-1].append(line)
        else:
            outside.append(line)
    assert not inside, "a fenced block is not closed"
    return fenced, outside


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_not_reflowed(page: Path) -> None:
    """Each row has the columns of its head, and no row is part of a paragraph."""
    _, outside = blocks(page.read_text(encoding="utf-8"))
    columns = 0
    for line in outside:
        bare = re.sub(r"`[^`]*`", "", line.replace("\\|", ""))
        if line.startswith("|"):
            cells = bare.count("|") - 1
            columns = columns or cells
            assert bare.rstrip().endswith("|"), line
            assert cells == columns, line
        else:
            columns = 0
            assert "| ---" not in bare, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_fenced(page: Path) -> None:
    """Formatters of paragraphs join the lines of a block that is only indented, as they once did with the formulas."""
    _, outside = blocks(page.read_text(encoding="utf-8"))
    after_blank = [line for before, line in pairwise(["", *outside]) if not before.strip()]
    assert not [line for line in after_blank if line.startswith("    ")]


def test_the_formulas_of_the_decision_stand_line_by_line() -> None:
    fenced, _ = blocks(DECISION)
    starts = [line.split("=")[0].strip() for block in fenced for line in block if "=" in line]

    assert starts == [
        "d",
        "n < 8:  v",
        "n ≥ 8:  v",
        "SE",
        "ν",
        "low, high",
        "spent(n)",
        "α(n)",
        "α at last",
        "P(X ≥ a)",
    ]


@pytest.mark.parametrize("section", [Promotion(), Probation()])
def test_defaults_are_those_of_the_code(section: Promotion | Probation) -> None:
    for name, value in section.model_dump(exclude={"probation"}).items():
        match name:
            case "pairs":
                shown = ", ".join(map(str, value))
            case "duration" | "crashes_within":
                shown = f"{value / 60:g}m"
            case "burn":
                shown = f"{value:g}"
            case _:
                shown = str(value)
        assert f"| `{name}` | {shown} |" in DECISION


def test_links_lead_somewhere() -> None:
    pages = [*DOCS.glob("*.md"), *(ROOT / "deploy").glob("*/README.md")]
    assert len(pages) >= 8
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page}: {target}"


def test_every_folder_of_deploy_has_its_short_readme() -> None:
    folders = [folder for folder in (ROOT / "deploy").iterdir() if folder.is_dir()]
    assert folders
    for folder in folders:
        lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
        assert 3 < len(lines) <= 60, folder
