"""The command `sloguard plan`: what a window would do, without starting anything."""

import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console

from sidecar.cli.operator import CommandRefused
from sidecar.cli.places import ConfigOption, FileArgument, loaded_of
from sidecar.cli.rendering import AsJson, machine_line, print_json, show_budget
from sidecar.cli.terminal import busy_indicator
from sidecar.config.schema import Config, ConfigError, Workload
from sidecar.format import assignments, change, setting, when
from sidecar.guard.guard import Args, Guard
from sidecar.guard.memory_learning import Learning
from sidecar.preflight.engine_host import EngineHost, engine_host
from sidecar.preflight.engine_memory import running
from sidecar.preflight.recorded_durations import recorded_durations
from sidecar.preflight.window_forecast import forecast
from sidecar.preflight.window_plan import Incumbent, KnobPlan, NextWindow, RuledOut, WindowPlan, cold, knob_plan
from sidecar.record import lock
from sidecar.record.events import Operations
from sidecar.record.journal import JOURNAL_FILE, Journal
from sidecar.record.trial import RepairChange, Role
from sidecar.report import wording
from sidecar.search.contract import Proposal
from sidecar.service.window_policy import window_refusal
from vllm_sloguard.agent.serve_command import flags
from vllm_sloguard.guard.known_model import KnownModel
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import gib
from vllm_sloguard.guard.memory import max_model_len as longest_request
from vllm_sloguard.guard.repair import Repair
from vllm_sloguard.guard.rules.arguments import misspelt, typed_arguments
from vllm_sloguard.guard.rules.human_sizes import as_number
from vllm_sloguard.guard.start_history import Learned, version
from vllm_sloguard.hooks.settings import Settings, SettingsError
from vllm_sloguard.knobs import KnobValues as Knobs


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command()(plan)


def plan(file: FileArgument = None, config_file: ConfigOption = None, as_json: AsJson = False) -> None:
    """Show what a window would do, without starting anything: memory, knobs, trials, time, reasons for a refusal now.

    The exit code is 1 if a window could not run as configured, and 2 for a mistake in the file.

    Example: sloguard plan -c sloguard.yaml
    """
    loaded = loaded_of(file, config_file)
    with busy_indicator("checking the knobs with the guard"):
        found, here, held = planned(loaded.config, loaded.warnings)
    if as_json:
        print_json({**asdict(found), "held_bytes": held, "problem": found.problem})
    else:
        _show(found, here, held)
    if found.problem:
        raise CommandRefused(found.problem)


def planned(config: Config, warnings: Sequence[str] = ()) -> tuple[WindowPlan, Machine, int]:
    """The plan, the machine that it assumes, and the bytes that this sidecar's own engines use now.

    ``warnings`` are those of the file. Raises ConfigError, JournalError, OSError.
    """
    with engine_host(config) as host:
        return _planned(config, host, warnings)


def _planned(config: Config, host: EngineHost, warnings: Sequence[str]) -> tuple[WindowPlan, Machine, int]:
    journal = Journal(config.state, read_only=True) if (config.state / JOURNAL_FILE).is_file() else None
    operations = Operations(journal, config.base_digest()) if journal is not None else None
    current = operations.current() if operations is not None else None
    args: Args = current.args if current is not None else config.engine.args
    here, held = host.machine_without(running(journal), args)
    known = host.known_model()
    learned = Learning(journal, config.state, config.model, lambda _: here).current() if journal else Learned()
    vllm = host.vllm_version() or learned.vllm_version
    guard = Guard(config, lambda _: here, lambda: learned, lambda: known)
    serves = _incumbent(config, args, current.id if current is not None else None, learned, here, known)
    takes = recorded_durations(config, journal, operations)
    found = WindowPlan(
        vllm_version=vllm,
        machine=here.source,
        incumbent=serves,
        command=shlex.join(["vllm", "serve", config.model, *flags(args)]),
        optimizer=config.search.optimizer,
        objective=str(config.objective),
        slo=config.slo.upper_limits,
        load=f"{config.workload.rate:g} requests/s of {config.workload.prompts}",
        unguarded=tuple(config.search.unguarded),
        knobs=_knobs(config, args, guard, vllm),
        takes=takes,
        forecast=forecast(config, takes),
        next_window=_next_window(config, operations),
        warnings=(
            *warnings,
            *(
                f"engine.args: {name} is not an argument that the guard knows; did you mean {meant}?"
                for name, meant in misspelt(config.engine.args).items()
            ),
        ),
    )
    return found, here, held


def _incumbent(  # noqa: PLR0917 - all that it depends on
    config: Config, args: Args, promotion: int | None, learned: Learned, here: Machine, known: KnownModel
) -> Incumbent:
    """The current configuration ``args`` with the plugin's repairs inside vLLM."""
    repaired = learned.repairer(
        known,
        here,
        time.time(),
        pinned=_pinned(config),
        workload_max_len=config.workload.longest_request_tokens,
    )
    result: Repair = repaired({n: as_number(n, v) for n, v in args.items() if not isinstance(v, list)})
    changes = tuple(RepairChange(c.name, c.before, c.after, c.reason) for c in result.changes)
    length = None if result.refusal else longest_request(known.shape_with(result.args), typed_arguments(result.args))
    unfit = "" if "max_model_len" in config.search.knobs else _unfit(config.workload, length)
    no_budget = "" if result.budget is not None else result.refusal or known.problem or _NOT_BUILT
    return Incumbent(promotion, dict(args), changes, result.refusal, unfit, result.budget, result.warning, no_budget)


_NOT_BUILT = "these arguments change the model, and the vLLM of engine.python could not be asked about it"


def _unfit(workload: Workload, length: int | None) -> str:
    needed = workload.longest_request_tokens - 1
    if length is None or needed <= length:
        return ""
    return f"workload: its longest request has {needed} tokens, but max_model_len is {length}"


def _pinned(config: Config) -> frozenset[str]:
    try:
        return Settings.from_environ({**os.environ, **config.engine.env}).pinned
    except SettingsError as error:
        raise ConfigError(f"engine.env: {error}") from None


def _knobs(config: Config, args: Args, guard: Guard, vllm: str) -> tuple[KnobPlan, ...]:
    project = guard.projector(args)
    serves: dict[str, Any] = {n: v for n, v in args.items() if n in config.search.knobs and not isinstance(v, list)}

    def why(knobs: Knobs) -> str:
        asked = guard.plan(args, Proposal({**serves, **knobs}, "plan", "asked by plan"), Role.SEARCH)
        own = [change.reason for change in asked.changes if change.name in knobs]
        return asked.refusal or "; ".join(own)

    known, live = version(vllm) if vllm else None, config.engine.live_trials
    return tuple(
        knob_plan(
            knob,
            serves.get(knob.name),
            lambda knobs: project({**serves, **knobs}),
            why,
            cold(knob, (known[0], known[1]) if known else None, live_trials=live),
        )
        for knob in config.search.space_knobs()
    )


def _next_window(config: Config, operations: Operations | None) -> NextWindow:
    window, now = config.window, time.time()
    refusals: list[str] = []
    if lock.holder(config.state) is None:
        refusals.append("no `sloguard serve` is running on this state folder")
    if operations is not None:
        if (opened := operations.open_window()) is not None:
            refusals.append(f"a window has been open since {when(opened.at)}")
        # Only the running sidecar knows the traffic.
        blind = window.model_copy(update={"max_rate": None})
        if why := window_refusal(blind, now, operations.paused(), operations.last_window(), None, force=False):
            refusals.append(why)
    notes = (f"refused above {window.max_rate:g} requests/s (window.max_rate)",) if window.max_rate else ()
    return NextWindow(window.next_opening(now), window.cron, tuple(refusals), notes)


def _show(found: WindowPlan, here: Machine, held: int) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    say: Callable[[str], None] = console.print
    say(
        "verdict: " + (f"no window could run: {found.problem}" if found.problem else "a window could run as configured")
    )
    for warning in found.warnings:
        say(f"warning: {warning}")
    say(f"vLLM {found.vllm_version or 'of unknown version'}, optimizer {found.optimizer}, objective {found.objective}")
    limits = (f"{name.removesuffix('_ms')} ≤ {wording.measured_text(name, limit)}" for name, limit in found.slo.items())
    say(f"SLO: {', '.join(limits)}")
    say(f"load: {found.load}")
    if held:
        say(f"the serving engine uses {gib(held)} GiB, counted as free: a window stops it first")
    serves = found.incumbent
    if serves.budget is not None:
        show_budget(serves.budget, here)
    else:
        say(machine_line(here))
        say(f"memory: not computed: {serves.no_budget}; the rules are still checked")
    origin = "the file's arguments" if serves.promotion is None else f"promotion {serves.promotion}"
    say(f"\ncurrent configuration: {origin}: {assignments(serves.args)}")
    say(f"  as a command line: {found.command}")
    for made in serves.changes:
        say(f"  repaired by the plugin: {change(made.name, made.before, made.after)}: {made.reason}")
    if serves.refusal:
        say(f"  it could not start: {serves.refusal}")
    if serves.warning:
        say(f"  warning: {serves.warning}")
    _show_knobs(say, found.knobs)
    if found.unguarded:
        say("\nunguarded trials (search.unguarded), each counted in the budget:")
    for args in found.unguarded:
        say(f"  {assignments(args)}")
    _show_time(say, found)
    _show_next_window(say, found.next_window)


def _show_knobs(say: Callable[[str], None], knobs: tuple[KnobPlan, ...]) -> None:
    for title, chosen in (
        ("live knobs (changed while the engine runs):", [knob for knob in knobs if not knob.cold]),
        ("cold knobs (each change needs a start):", [knob for knob in knobs if knob.cold]),
    ):
        if chosen:
            say(f"\n{title}")
        for knob in chosen:
            say(f"  {knob.name}: {knob.values}; now {_now(knob)}")
            for out in knob.ruled_out:
                say(f"    ruled out {_out(out)}")


def _now(knob: KnobPlan) -> str:
    return "vLLM's default" if knob.now is None else setting(knob.now, knob.name)


def _out(out: RuledOut) -> str:
    return f"{out.values}: {out.reason}" if out.reason else out.values


def _show_time(say: Callable[[str], None], found: WindowPlan) -> None:
    expected, takes = found.forecast, found.takes
    say(f"\na window of {expected.window_s / 60:g} minutes:")
    say(f"  drain {takes.drain.seconds:.0f} s ({takes.drain.source})")
    say(
        f"  search: {expected.trials} of at most {expected.budget} trials including the baseline,"
        f" about {expected.search_s / 60:.1f} minutes; a trial takes {takes.trial.seconds:.0f} s ({takes.trial.source})"
    )
    analyses = " or ".join(map(str, expected.analyses)) or "none"
    say(
        f"  validation: {analyses} A/B pairs, up to {expected.validation_s / 60:.1f} minutes; one measurement takes"
        f" {takes.validation.seconds:.0f} s ({takes.validation.source}); time is kept for {expected.pairs_reserved};"
        f" one unmeasured warm-up start of each side, {takes.warm_start.seconds:.0f} s ({takes.warm_start.source})"
    )
    say(f"  reserved for the restore: {expected.restore_s:.0f} s ({takes.start.source})")


def _show_next_window(say: Callable[[str], None], next_window: NextWindow) -> None:
    if next_window.next_at is not None:
        say(f'\nthe next window opens at {when(next_window.next_at)} (window.cron "{next_window.cron}")')
    else:
        say("\nno window is scheduled (window.cron is not set); `sloguard retune --now` opens one")
    for why in next_window.refusals:
        say(f"  refused now: {why}")
    for note in next_window.notes:
        say(f"  {note}")
