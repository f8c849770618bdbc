"""Decisions and evidence round-trip through the journal as frozen types, for journals of every version."""

import json
import math
from pathlib import Path

import pytest

from sidecar.config.schema import Objective, Slo, Workload
from sidecar.config.window import Promotion
from sidecar.record.decisions import Decision, Evidence, Outcome, Provenance
from sidecar.record.journal import Journal, JournalError
from sidecar.record.wording import OUTCOMES

DECISION = Decision(Outcome.PROMOTED, "better", 8, 0.2, 0.001, -math.inf, 0.3, 0.01, 3, (3, 6, 7), (4, 5, 8))
PROVENANCE = Provenance(
    sloguard="0.1.0",
    vllm="0.26.0",
    device="NVIDIA H200",
    driver="570.1",
    model="a-model",
    model_config_sha256="0f",
    objective=Objective.GOODPUT,
    slo=Slo(ttft_p99_ms=500),
    workload=Workload(rate=4),
    promotion=Promotion(pairs=(2, 4)),
)


def rewritten(folder: Path, statement: str, content: dict[str, object]) -> Journal:
    """A journal of one run and one promotion, one of them with ``content`` in place of its own."""
    journal = Journal(folder)
    run = journal.begin_run("digest", "{}", {})
    journal.end_run(run.id, DECISION)
    journal.promote(run.id, "base", {}, Evidence(DECISION, PROVENANCE))
    journal.write(statement, (json.dumps(content),))
    return journal


def test_they_are_read_as_they_were_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    run = journal.begin_run("digest", "{}", {})
    journal.end_run(run.id, DECISION)
    journal.promote(run.id, "base", {}, Evidence(DECISION, PROVENANCE))

    last = journal.last_run()
    assert last is not None
    assert last.decision == DECISION
    assert journal.decisions() == {run.id: DECISION}
    assert [p.evidence for p in journal.promotions()] == [Evidence(DECISION, PROVENANCE)]


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("promoted", Outcome.PROMOTED),
        ("kept (no clear winner)", Outcome.KEPT),
        ("kept (worse)", Outcome.WORSE),
        ("inconclusive", Outcome.INCONCLUSIVE),
        ("interrupted", Outcome.INTERRUPTED),
    ],
)
def test_the_outcomes_of_version_0_1_are_read(tmp_path: Path, text: str, outcome: Outcome) -> None:
    journal = rewritten(tmp_path, "UPDATE runs SET decision = ?", {"outcome": text, "reason": "noise"})

    assert journal.decisions() == {1: Decision(outcome, "noise")}


def test_the_evidence_of_version_0_1_is_read(tmp_path: Path) -> None:
    """Evidence was one flat object; fields of other versions are ignored."""
    content: dict[str, object] = {
        **{"outcome": "promoted", "reason": "better", "trial": 8, "gain": 0.2, "candidates": [4, 5, 8]},
        **{"sloguard": "0.1.0", "vllm": "0.26.0", "device": "CPU: X", "driver": None, "model": "a-model"},
        **{"model_config_sha256": None, "objective": "latency", "slo": {"ttft_p99_ms": 500.0, "ttlt_p99_ms": 1.0}},
        "workload": {"rate": 4.0, "requests": 200},
        "promotion": {"pairs": [3, 5], "probation": {"duration": "1800s"}},
    }

    promoted = rewritten(tmp_path, "UPDATE promotions SET evidence = ?", content).promotions()[0]

    assert promoted.evidence is not None
    assert promoted.evidence.decision == Decision(Outcome.PROMOTED, "better", 8, 0.2, candidates=(4, 5, 8))
    assert promoted.evidence.provenance.slo.ttft_p99_ms == 500
    assert promoted.evidence.provenance.promotion.pairs == (3, 5)


@pytest.mark.parametrize("content", [{}, {"outcome": "won", "reason": ""}, {"outcome": "kept", "reason": 1}])
def test_a_damaged_decision_is_one_line(tmp_path: Path, content: dict[str, object]) -> None:
    journal = rewritten(tmp_path, "UPDATE runs SET decision = ?", content)

    with pytest.raises(JournalError, match=r"^the journal is damaged: decision: ") as raised:
        journal.last_run()
    assert len(str(raised.value).splitlines()) == 1


def test_every_outcome_has_its_words() -> None:
    assert set(OUTCOMES) == set(Outcome)
