"""Chooses the engine of a trial: the previous trial's, changed live, or a new one, forked if possible.

An engine of the search starts with raised limits (``Plan.ceilings``) and is lowered at once to what the trial needs, so
that later trials have headroom. What is compared for a promotion always runs on a new engine with exactly the plan's
arguments, started the way the serving engine is.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from sidecar.config.schema import Config
from sidecar.engine.engine import Engine, EngineCrashed, Launch
from sidecar.engine.live_knobs import LiveError, LiveHub, live_targets
from sidecar.record.trial import VALIDATING, Plan, Role, StartKind
from sidecar.run.engine_manager import EngineManager
from vllm_sloguard.agent.serve_command import Args
from vllm_sloguard.crash import Crash
from vllm_sloguard.knobs import Value

_CHANGE_TIMEOUT_S = 10.0
# How long to wait for an engine core to subscribe to live changes, which it does before its first token.
_CAPABLE_S = 3.0

Launcher = Callable[[Args], Launch]


@dataclass(frozen=True)
class ReadyEngine:
    """An engine that has answered its first token. ``exact``: it was started with exactly the plan's arguments."""

    engine: Engine
    start: StartKind
    start_s: float
    exact: bool


class NotStartedError(RuntimeError):
    """The start crashed; ``engine`` is None if no process was started. ``exact`` as in ReadyEngine."""

    def __init__(self, crash: Crash, engine: Engine | None, start: StartKind, *, exact: bool) -> None:
        super().__init__(crash.evidence)
        self.crash = crash
        self.engine = engine
        self.start = start
        self.exact = exact


class TrialEngines:
    """Keeps one engine at most."""

    def __init__(self, config: Config, live: LiveHub, engines: EngineManager, say: Callable[[str], None]) -> None:
        self._config = config
        self._live = live
        self._engines = engines
        self._say = say
        self._changes = config.engine.live_trials
        self._kept: Engine | None = None

    @property
    def kept(self) -> bool:
        """Whether an engine of an earlier trial is still running."""
        return self._kept is not None

    def warm_up(self) -> None:
        """Starts the fork server without waiting for it."""
        if self._config.engine.forked_trials:
            self._engines.warm_up_forks()

    def release(self) -> None:
        """Stops the kept engine, and the fork server unless it will start the serving engine. Raises NotGoneError."""
        self._end_kept()
        if not self._config.engine.forked_serving:
            self._engines.end_forks()

    def _end_kept(self) -> None:
        if self._kept is not None:
            engine, self._kept = self._kept, None
            self._end(engine)

    def _end(self, engine: Engine) -> None:
        # No requests are in flight, and a kill leaves less behind than vLLM's own shutdown.
        self._engines.end(engine, drain=False)

    def keep(self, ready: ReadyEngine, plan: Plan) -> bool:
        """Keeps the engine of ``plan`` for the next trial, if possible; otherwise the caller must stop it."""
        if plan.role is Role.SEARCH and self._changes:
            self._kept = ready.engine
        return self._kept is ready.engine

    def get(
        self, plan: Plan, launch: Launcher, cancelled: Callable[[], bool], *, exact: bool, measured: bool = True
    ) -> ReadyEngine:
        """An engine that runs ``plan``; ``exact`` asks for a new one with exactly its arguments.

        What is compared for a promotion starts the way the service does, unless it is not ``measured``.

        Raises NotStartedError or Cancelled, with nothing left running.
        """
        live = plan.role is Role.SEARCH and not exact and self._changes
        if live and (ready := self._changed(plan)) is not None:
            return ready
        self._end_kept()
        if live and plan.ceilings:
            raised = launch({**plan.args, **plan.ceilings})
            ready = self._started(raised, plan.role, cancelled, exact=False, fork=self._forks(plan.role))
            if self._lowered(ready.engine, plan.args):
                return ready
            self._end(ready.engine)
            self._changes = False
        fork = self._forks(plan.role, measured=measured)
        return self._started(launch(plan.args), plan.role, cancelled, exact=True, fork=fork)

    def undone(self, engine: Engine) -> bool:
        """Whether a live change of ``engine`` was lost, so that the measurement belongs to no known configuration."""
        try:
            effects = self._live.effects(engine.launch.engine_id)
            taken = effects.applied_s is not None and effects.settled_s is not None
            why = "" if taken else "the engine did not confirm one"
        except LiveError as error:
            why = str(error)
        if why:
            self._say(f"live changes are disabled: {why}")
            self._changes = False
        return bool(why)

    def _changed(self, plan: Plan) -> ReadyEngine | None:
        """The previous trial's engine with ``plan`` applied; None if that needs a restart."""
        engine, self._kept = self._kept, None
        if engine is None:
            return None
        began = time.monotonic()
        if engine.alive() and self._lowered(engine, plan.args):
            return ReadyEngine(engine, StartKind.LIVE, time.monotonic() - began, exact=False)
        self._end(engine)
        return None

    def reaches(self, args: Args) -> bool:
        """Whether the kept engine can behave as if it had been started with ``args``."""
        return self._kept is not None and self._reach(self._kept, args) is not None

    def _reach(self, engine: Engine, args: Args) -> dict[str, int] | None:
        started, wanted = _scalars(engine.launch.args), _scalars(args)
        lists = {n: v for n, v in engine.launch.args.items() if n not in started}
        if lists != {n: v for n, v in args.items() if n not in wanted}:
            return None
        try:
            able = self._live.capabilities(engine.launch.engine_id, _CAPABLE_S)
        except LiveError:
            return None
        return live_targets(started, wanted, able)

    def _lowered(self, engine: Engine, args: Args) -> bool:
        """Applies ``args`` to ``engine`` and empties its caches; whether that succeeded."""
        targets = self._reach(engine, args)
        if targets is None:
            return False
        try:
            self._live.change(engine.launch.engine_id, targets, _CHANGE_TIMEOUT_S, settle=True)
        except LiveError as error:
            self._say(f"a live change failed: {error}")
            return False
        return True

    def _forks(self, role: Role, *, measured: bool = True) -> bool:
        """Whether an engine of ``role`` is forked: what a validation measures starts the way the service does."""
        engine = self._config.engine
        return engine.forked_serving if role in VALIDATING and measured else engine.forked_trials

    def _started(
        self, launch: Launch, role: Role, cancelled: Callable[[], bool], *, exact: bool, fork: bool
    ) -> ReadyEngine:
        engine: Engine | None = None
        start = StartKind.ORDINARY
        began = time.monotonic()
        try:
            engine, start = self._engines.begin(launch, "trial", fork=fork)
            engine.wait_ready(self._config.engine.start_timeout_s, cancelled)
        except EngineCrashed as crashed:
            if engine is not None:
                self._end(engine)
            if start is StartKind.FORKED and role in (Role.BASELINE, *VALIDATING):
                self._engines.fork_no_more(f"a forked engine of the {role} crashed")
                if role in VALIDATING:  # as the serving engine, it gets an ordinary start before that counts
                    return self._started(launch, role, cancelled, exact=exact, fork=False)
            raise NotStartedError(crashed.crash, engine, start, exact=exact) from None
        except BaseException:
            if engine is not None:
                self._end(engine)
            raise
        return ReadyEngine(engine, start, time.monotonic() - began, exact)


def _scalars(args: Args) -> dict[str, Value]:
    return {name: value for name, value in args.items() if not isinstance(value, list)}
