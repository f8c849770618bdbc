"""The pages under docs/ are what the code says: generated ones are fresh, and the example's numbers are computed."""

# ruff: noqa: RUF001 - the signs of the page

import importlib.util
import math
import re
import subprocess
import sys
from dataclasses import replace
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
from sidecar.promote.probation import binomial_tail
from sidecar.record.trial import Result, Role, Trial
from vllm_sloguard.crash import Category
from vllm_sloguard.crash.advice import CRASH_RULES
from vllm_sloguard.knobs import KNOBS

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
    assert re.findall(r"^## (.*)$", knobs, re.MULTILINE) == list(KNOBS)
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
    assert decision.outcome is promotion.Outcome.PROMOTED
    assert f'"{decision.outcome}: {decision.reason}"' in FLAT
    # The order is that of the page: incumbent, candidate, candidate, incumbent.
    assert [t.plan.role for t in trials[2:6]] == [Role.REFERENCE, Role.VALIDATION, Role.VALIDATION, Role.REFERENCE]


def test_the_example_s_other_candidate_is_measured_again(tmp_path: Path) -> None:
    config = configured(tmp_path)
    trials = run_of(config, [650.0, 731.0, 790.0])
    assert promotion.next_role(trials, config) is not None
    said = promotion.decide(trials, config).reason
    assert re.search(r"gain [^;]*", said).group() in FLAT  # pyright: ignore[reportOptionalMemberAccess]
    assert "650, 731 and 790 ms" in FLAT


def test_the_example_s_arithmetic(tmp_path: Path) -> None:
    config = configured(tmp_path)
    rule = config.promotion
    starts = example()
    logs = [[-math.log(ms) for ms, _ in starts[side]] for side in (INCUMBENT, CANDIDATE)]
    deviations = [float(np.std(side, ddof=1)) for side in logs]
    alpha = (1 - rule.confidence) / len(rule.pairs)
    found = statistics.welch(logs[0], logs[1], alpha, floor=rule.noise)
    error = math.sqrt(2 * rule.noise**2 / 3)
    share = [1 - math.exp(-log) for log in (found.log_ratio, found.low, found.high)]
    limit = (1 - rule.slo_confidence) / len(rule.pairs)
    excess = [(ttft - 500) / 500 for _, ttft in starts[CANDIDATE]]
    for said in (
        f"α = (1 − 0.98) / 3 = {alpha:.5f}",
        f"are {deviations[0]:.4f} and {deviations[1]:.4f}, both below `noise`",
        f"SE = √(0.01² / 3 + 0.01² / 3) = {error:.5f}, ν = 4.0, t = {(found.high - found.log_ratio) / error:.3f}",
        f"d = {found.log_ratio:.4f}; low, high = {found.low:.4f}, {found.high:.4f}",
        f"p = {found.p_value:.5f}",
        f"{share[0]:.1%} are saved, between {share[1]:.1%} and {share[2]:.1%}",
        f"m = {', '.join(f'−{-m:.3f}' for m in excess)}; α = (1 − 0.9) / 3 = {limit:.4f}",
        f"the upper bound of the mean is −{-statistics.confidence_bounds(excess, limit)[1]:.3f} ≤ 0",
        f"600 requests ≥ {rule.requests_for_p99}",
        f"which is {rule.requests_for_p99} at 0.9",
        f"ln 1.1 / √12 = {math.log(TOLERANCE) / math.sqrt(12):.4f}",
        f"from 22 on: P(X ≥ 22) = {binomial_tail(22, 1000, 0.01):.4f}",
    ):
        assert said in FLAT, said
    assert binomial_tail(21, 1000, 0.01) > 0.001 > binomial_tail(22, 1000, 0.01)
    assert max(deviations) < rule.noise


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
