"""Turns a proposal into a plan: runs the plugin's repair pass before an engine is started."""

import time
from collections.abc import Callable

from sidecar.config.schema import Config
from sidecar.guard.live_headroom import ceilings
from sidecar.guard.model_builds import model_of
from sidecar.record.trial import Plan, RepairChange, Role
from sidecar.search.contract import Projection, Proposal
from vllm_sloguard.agent.serve_command import Args
from vllm_sloguard.guard.known_model import KnownModel
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.repair import Repair
from vllm_sloguard.guard.rules.human_sizes import as_number
from vllm_sloguard.guard.start_history import Learned, ranks_of
from vllm_sloguard.knobs import KnobValues as Knobs


class Guard:
    """Repairs and refuses proposals for one configuration file.

    ``observe`` returns the machine's current state for a number of ranks, ``learned`` what earlier starts taught, and
    ``known_model`` what is known of the model; by default what this machine says.
    """

    def __init__(
        self,
        config: Config,
        observe: Callable[[int], Machine],
        learned: Callable[[], Learned] = Learned,
        known_model: Callable[[], KnownModel] | None = None,
    ) -> None:
        self._observe = observe
        self._learned = learned
        self._workload_max_len = config.workload.longest_request_tokens
        self._space_knobs = config.search.space_knobs()
        self._knobs = frozenset(config.search.knobs)
        self._known_model = known_model or (lambda: model_of(config.model, config.engine.python))
        self._known: KnownModel | None = None

    def plan(self, incumbent: Args, proposal: Proposal, role: Role) -> Plan:
        """The engine arguments for ``proposal`` with the reason for each change, or a refusal."""
        args: dict[str, bool | int | float | str | list[str]] = {**incumbent, **proposal.config}
        if role in (Role.UNGUARDED, Role.BASELINE, Role.REFERENCE):
            # Started like the incumbent: unmodified; the plugin repairs the arguments inside vLLM.
            return Plan(role, dict(proposal.config), args, proposal.phase, proposal.reason)
        repaired = self._repairer(incumbent, self._observe(ranks_of(args)))
        result = repaired(args)
        changes = tuple(RepairChange(c.name, c.before, c.after, c.reason, c.rules) for c in result.changes)
        for change in changes:
            if change.after is None:
                args.pop(change.name, None)
            else:
                args[change.name] = change.after
        higher = {} if result.refusal else ceilings(self._space_knobs, result.args, repaired)
        return Plan(
            role,
            dict(proposal.config),
            args,
            proposal.phase,
            proposal.reason,
            changes,
            result.refusal,
            higher,
            result.warning,
        )

    def projector(self, incumbent: Args) -> Callable[[Knobs], Projection]:
        """What ``plan`` would do with a configuration of the search on the machine as it is now."""
        repaired = self._repairer(incumbent, self._observe(ranks_of(incumbent)))

        def project(config: Knobs) -> Projection:
            result = repaired({**incumbent, **config})
            kept = {name: value for name, value in result.args.items() if name in self._knobs}
            return Projection(kept, result.refusal, result.budget.kv_tokens if result.budget else None)

        return project

    def _repairer(self, incumbent: Args, machine: Machine) -> Callable[[Args], Repair]:
        """The repair pass with current knowledge. Arguments of the incumbent that are not searched are pinned."""
        learned, now = self._learned(), time.time()
        if self._known is None:
            self._known = self._known_model()
        repaired_scalars = learned.repairer(
            self._known,
            machine,
            now,
            pinned=frozenset(incumbent) - self._knobs,
            workload_max_len=self._workload_max_len,
        )

        def repaired(args: Args) -> Repair:
            return repaired_scalars(
                {n: as_number(n, value) for n, value in args.items() if not isinstance(value, list)}
            )

        return repaired
