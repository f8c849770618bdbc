"""What serves now, where it was measured, and the commands that repeat, use or undo it. Pure."""

import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from sidecar.engine.command import flags
from sidecar.format import change, when
from sidecar.promote.promoted_file import PROMOTED_FILE
from sidecar.record.decisions import Outcome
from sidecar.record.run_snapshot import Recorded
from sidecar.record.states import ENGINE_ENDED, ENGINE_SERVES_ON, State
from sidecar.report import wording
from vllm_sloguard import __version__

# What a run does not depend on, and what may name the host's other business.
_NOT_OF_THE_RUN = ("sloguard", "state", "window", "metrics", "page", "remote")


@dataclass(frozen=True)
class Fact:
    """One line of a table."""

    name: str
    value: str


@dataclass(frozen=True)
class Command:
    """What an operator may type, and what for."""

    purpose: str
    line: str


def serving(recorded: Recorded) -> tuple[str, ...]:
    """What serves from this state folder now, in sentences."""
    current = next((p for p in reversed(recorded.promotions) if p.rolled_back_at is None), None)
    ours = next((p for p in recorded.promotions if p.run == recorded.run.id), None)
    said = [_service(recorded)]
    if ours is not None and ours.rolled_back_at is not None:
        at, why = when(ours.rolled_back_at), wording.sentence(ours.rollback_reason or "no reason was recorded")
        said.append(f"This run's promotion was rolled back at {at} and is not tried again: {why}")
    if current is None:
        said.append(f"{_in_force(recorded)} the arguments of the configuration file: nothing that was promoted holds.")
    elif ours is not None and current.id == ours.id:
        changed = _changes(recorded.run.incumbent, current.args)
        said.append(
            f"{_in_force(recorded)} this run's winner (promotion {current.id}), since {when(current.at)}: {changed}."
        )
    else:
        of = f"of run {current.run}" if current.run is not None else "that undid an earlier one"
        said.append(f"{_in_force(recorded)} promotion {current.id} {of}, since {when(current.at)}.")
    return tuple(said)


def _in_force(recorded: Recorded) -> str:
    return "In force:" if recorded.alive else "What a sidecar that is started now would serve:"


def _service(recorded: Recorded) -> str:
    state = recorded.state
    if state is None:
        return (
            "Nothing is known to serve: no sidecar has served from this state folder, so nothing was started with it;"
            " see the commands at the end."
        )
    at = when(state.at)
    if recorded.alive:
        return f"The sidecar runs; since {at} it is {state.state}: {state.reason}."
    if state.state == State.HALTED and state.reason == ENGINE_ENDED:
        return f"Nothing serves: the sidecar ended at {at}, and its engine with it."
    if state.state == State.HALTED and state.reason == ENGINE_SERVES_ON:
        return f"The sidecar ended at {at}, and left its engine serving; nothing has watched that engine since."
    if state.state == State.HALTED:
        return f"The sidecar does not run; it ended at {at}: {state.reason}."
    return (
        "Nothing is known to serve: the sidecar does not run, and did not say that it ended; its last word,"
        f" {at}, was {state.state}: {state.reason}."
    )


def _changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    names = dict.fromkeys((*before, *after))
    return (
        ", ".join(
            change(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)
        )
        or "the same arguments as before"
    )


def versions(recorded: Recorded) -> tuple[Fact, ...]:
    """What the figures depend on: the model, the load, vLLM, the machine as far as it was recorded."""
    setup, load = recorded.setup, recorded.setup.workload
    evidence = next((p.evidence for p in recorded.promotions if p.run == recorded.run.id), None)
    origin = evidence.provenance if evidence else None
    heard = dict.fromkeys(t.result.vllm_version for t in recorded.trials if t.result and t.result.vllm_version)
    limits = "; ".join(
        f"{wording.LIMITS[name]} at most {wording.measured_text(name, limit)}"
        for name, limit in setup.slo.model_dump().items()
        if limit is not None
    )
    unknown = "recorded with promotions only"
    facts = {
        "model": setup.model,
        "SHA-256 of its config.json": origin.model_config_sha256 if origin else None,
        "vLLM": ", ".join(heard) or (origin.vllm if origin else "") or "its plugin did not say",
        "sloguard": f"{setup.content.get('sloguard') or (origin.sloguard if origin else 'not recorded')} (run),"
        f" {__version__} (report)",
        "device": origin.device if origin else unknown,
        "driver": origin.driver if origin else None,
        "limits (SLO)": limits,
        "objective": wording.OBJECTIVES[setup.objective],
        "load": f"{load.rate:g} requests/s of {load.prompts}, seed {load.seed}",
        "search": f"{setup.optimizer}, a budget of {setup.budget} trials, seed {setup.seed}",
        "configuration digest": recorded.run.digest,
        "state folder": str(recorded.folder),
    }
    return tuple(Fact(name, str(value)) for name, value in facts.items() if value)


def commands(recorded: Recorded) -> tuple[tuple[Command, ...], str]:
    """What to type, and the configuration file to type it for, as YAML."""
    setup, decision = recorded.setup, recorded.decision
    promotion = next((p for p in recorded.promotions if p.run == recorded.run.id), None)
    rows = [
        Command(
            "Run the same search again (new measurements, same proposals to begin with)",
            "sloguard tune -c sloguard.yaml",
        )
    ]
    file = shlex.quote(str(recorded.folder / PROMOTED_FILE))
    if decision is not None and decision.outcome == Outcome.PROMOTED and promotion is not None:
        rows.append(Command("Serve the winner by hand", _serve(setup.model, promotion.args)))
    rows.append(Command("Serve what is in force, by its file", f"vllm serve --config {file}"))
    if promotion is not None and promotion.rolled_back_at is None:
        undo = f"sloguard rollback --promotion {promotion.id} --wait -c sloguard.yaml"
        rows.append(Command("Take this run's promotion back, where sloguard serve runs", undo))
    rows += [
        Command("Serve what was serving before this run, by hand", _serve(setup.model, recorded.run.incumbent)),
        Command("See every promotion, rollback and window", "sloguard history -c sloguard.yaml"),
        Command("Every trial, as a machine reads it", f"sloguard trials {shlex.quote(str(recorded.folder))} --json"),
    ]
    kept = {name: part for name, part in setup.content.items() if name not in _NOT_OF_THE_RUN and part is not None}
    bare = _bare(kept)
    # A knob without a range is searched nevertheless.
    knobs: dict[str, Any] = kept["search"].get("knobs") or {}
    bare["search"]["knobs"] = {name: _bare(given) for name, given in knobs.items()}
    return tuple(rows), yaml.safe_dump(bare, sort_keys=False, width=100)


def _serve(model: str, args: dict[str, Any]) -> str:
    return shlex.join(["vllm", "serve", model, *flags(args)])


def _bare(content: Any) -> Any:
    """Without what was left at None."""
    if not isinstance(content, dict):
        return content
    return {name: _bare(value) for name, value in content.items() if value is not None}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
