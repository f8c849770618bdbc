"""The current configuration, where it was measured, and commands to repeat, use or undo it. Pure."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from sidecar.format import when
from sidecar.promote.promoted_file import PROMOTED_FILE
from sidecar.record.decisions import Outcome
from sidecar.record.run_snapshot import RunSnapshot
from sidecar.record.states import Cause, State
from sidecar.report import wording
from vllm_sloguard import __version__
from vllm_sloguard.agent.serve_command import flags

# Sections that a run does not depend on; they may also name other hosts.
_NOT_OF_THE_RUN = ("sloguard", "device", "driver", "state", "window", "metrics", "page", "remote")


@dataclass(frozen=True)
class Fact:
    """A name with its value."""

    name: str
    value: str


@dataclass(frozen=True)
class Command:
    """A command line and its purpose."""

    purpose: str
    line: str


def serving(snapshot: RunSnapshot) -> tuple[str, ...]:
    """The current configuration and the state of the sidecar, in sentences."""
    current = next((p for p in reversed(snapshot.promotions) if p.rolled_back_at is None), None)
    ours = next((p for p in snapshot.promotions if p.run == snapshot.run.id), None)
    sentences = [_service(snapshot)]
    if ours is not None and ours.rolled_back_at is not None:
        at, why = when(ours.rolled_back_at), wording.sentence(ours.rollback_reason or "no reason was recorded")
        sentences.append(f"This run's promotion was rolled back at {at} and is quarantined: {why}")
    if current is None:
        sentences.append(f"{_current(snapshot)} the arguments of the configuration file; no promotion is in effect.")
    elif ours is not None and current.id == ours.id:
        sentences.append(f"{_current(snapshot)} this run's winner (promotion {current.id}), since {when(current.at)}.")
    else:
        of = f"of run {current.run}" if current.run is not None else "of a rollback"
        sentences.append(f"{_current(snapshot)} promotion {current.id} {of}, since {when(current.at)}.")
    return tuple(sentences)


def _current(snapshot: RunSnapshot) -> str:
    return "Current configuration:" if snapshot.alive else "Configuration that the next start serves:"


def _service(snapshot: RunSnapshot) -> str:
    state = snapshot.state
    if state is None:
        return "No `sloguard serve` has run on this state folder, so nothing serves the result yet: see Commands."
    at = when(state.at)
    if snapshot.alive:
        return f"The sidecar is running, {state.state} since {at}: {state.reason}."
    if state.state == State.HALTED and state.cause == Cause.ENGINE_STOPPED:
        return f"Nothing serves: the sidecar and its engine were stopped at {at}."
    if state.state == State.HALTED and state.cause == Cause.ENGINE_LEFT:
        return f"The sidecar was stopped at {at} and left its engine serving, unsupervised."
    if state.state == State.HALTED:
        return f"The sidecar is not running; it ended at {at}: {state.reason}."
    return (
        "The sidecar is not running and recorded no end: it was killed, or its machine went down. Its last state, at"
        f" {at}, was {state.state}: {state.reason}."
    )


def versions(snapshot: RunSnapshot) -> tuple[Fact, ...]:
    """What the measurements depend on: the model, the load, vLLM and, if recorded, the machine."""
    setup, load = snapshot.setup, snapshot.setup.workload
    evidence = next((p.evidence for p in snapshot.promotions if p.run == snapshot.run.id), None)
    origin = evidence.provenance if evidence else None
    reported = dict.fromkeys(t.result.vllm_version for t in snapshot.trials if t.result and t.result.vllm_version)
    limits = "; ".join(
        f"{wording.LIMITS[name]} at most {wording.measured_text(name, limit)}"
        for name, limit in setup.slo.upper_limits.items()
    )
    facts = {
        "model": setup.model,
        "SHA-256 of its config.json": origin.model_config_sha256 if origin else None,
        "vLLM": ", ".join(reported) or (origin.vllm if origin else "") or "not reported by the plugin",
        "sloguard": f"{setup.content.get('sloguard') or (origin.sloguard if origin else 'not recorded')} (run),"
        f" {__version__} (report)",
        "device": setup.device or (origin.device if origin else "not recorded (by an earlier version)"),
        "driver": setup.driver or (origin.driver if origin else None),
        "SLO": limits,
        "objective": wording.OBJECTIVES[setup.objective],
        "load": f"{load.rate:g} requests/s of {load.prompts}, seed {load.seed}",
        "search": f"{setup.optimizer}, a budget of {setup.budget} trials, seed {setup.seed}",
        "configuration digest": snapshot.run.digest,
        "state folder": str(snapshot.folder),
    }
    return tuple(Fact(name, str(value)) for name, value in facts.items() if value)


def commands(snapshot: RunSnapshot) -> tuple[tuple[Command, ...], str]:
    """The commands, and the configuration file for them, as YAML."""
    setup, decision = snapshot.setup, snapshot.decision
    promotion = next((p for p in snapshot.promotions if p.run == snapshot.run.id), None)
    rows = [
        Command(
            "Run the same search again (new measurements; the first proposals are the same)",
            "sloguard tune -c sloguard.yaml",
        )
    ]
    file = shlex.quote(str(snapshot.folder / PROMOTED_FILE))
    if decision is not None and decision.outcome == Outcome.PROMOTED and promotion is not None:
        rows.append(Command("Serve the winner without the sidecar", serve_line(setup.model, promotion.args)))
    rows.append(Command("Serve the promoted configuration from its file", f"vllm serve --config {file}"))
    if promotion is not None and promotion.rolled_back_at is None:
        undo = f"sloguard rollback --promotion {promotion.id} --wait -c sloguard.yaml"
        rows.append(Command("Roll back this run's promotion (needs a running sloguard serve)", undo))
    rows += [
        Command("Serve the incumbent of this run without the sidecar", serve_line(setup.model, snapshot.run.incumbent)),
        Command("List promotions, rollbacks and windows", "sloguard history -c sloguard.yaml"),
        Command("Get every trial as JSON", f"sloguard trials {shlex.quote(str(snapshot.folder))} --json"),
    ]
    kept = {name: part for name, part in setup.content.items() if name not in _NOT_OF_THE_RUN and part is not None}
    bare = _bare(kept)
    # A knob without a range of its own is searched over its default range.
    knobs: dict[str, Any] = kept["search"].get("knobs") or {}
    bare["search"]["knobs"] = {name: _bare(given) for name, given in knobs.items()}
    return tuple(rows), yaml.safe_dump(bare, sort_keys=False, width=100)


def serve_line(model: str, args: Mapping[str, Any]) -> str:
    """A `vllm serve` command line, quoted for a shell."""
    return shlex.join(["vllm", "serve", model, *flags(dict(args))])


def _bare(content: Any) -> Any:
    """Without fields that are None."""
    if not isinstance(content, dict):
        return content
    return {name: _bare(value) for name, value in content.items() if value is not None}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
