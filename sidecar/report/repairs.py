"""Arguments that the guard changed, proposals that it refused, and why. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.format import setting
from sidecar.record.trial import RepairChange, Trial
from sidecar.report import wording


@dataclass(frozen=True)
class Intervention:
    """One kind of repair or refusal, with the first trial as the example."""

    what: str
    example: str
    reason: str
    numbers: tuple[int, ...]


def interventions(trials: Sequence[Trial]) -> tuple[Intervention, ...]:
    """The most frequent first."""
    found: dict[tuple[str, str], list[tuple[int, str, str]]] = {}
    for trial in trials:
        for what, example, reason in _of(trial):
            found.setdefault((what, re.sub(r"[0-9.,]+", "#", reason)), []).append((trial.number, example, reason))
    made = (
        Intervention(what, rows[0][1], rows[0][2], tuple(number for number, _, _ in rows))
        for (what, _), rows in found.items()
    )
    return tuple(sorted(made, key=lambda one: -len(one.numbers)))


def _of(trial: Trial) -> list[tuple[str, str, str]]:
    sides = (("", trial.plan.changes), (" (inside vLLM)", trial.result.repairs if trial.result else ()))
    rows = [(f"changed {c.name}{where}", _example(c), c.reason) for where, changes in sides for c in changes]
    if trial.plan.refusal:
        rows.append(("refused", wording.arguments_text(trial.plan.proposed), trial.plan.refusal))
    if trial.plan.warning:
        rows.append(("passed with a warning", wording.arguments_text(trial.plan.proposed), trial.plan.warning))
    return rows


def _example(change: RepairChange) -> str:
    return f"{setting(change.before, change.name)} → {setting(change.after, change.name)}"
