"""What `sloguard status` says: what is running, whether the SLO is met, and what to do now. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from sidecar.cli.service_facts import ServiceFacts
from sidecar.format import setting, when
from sidecar.measure.verdict import slo_limits
from sidecar.observe.slo_compliance import ComplianceReport, LimitCompliance, SloCompliance
from sidecar.observe.watch_report import ADVICE_TEXTS
from sidecar.record.decisions import Outcome
from sidecar.record.states import COMING_UP, IN_A_WINDOW, State
from sidecar.record.trial import Role, Trial, TrialStatus
from sidecar.record.trial_states import RAN_STATUSES
from sidecar.record.wording import OUTCOMES
from sidecar.report.wording import LIMITS, duration, measured_text, plural

_FILE = "sloguard.yaml"
_RETUNE = "run `sloguard retune --now`"


class StatusTone(StrEnum):
    """The colour of a line."""

    PLAIN = ""
    GOOD = "green"
    WARN = "yellow"
    BAD = "red"
    QUIET = "dim"


_TONES = {
    SloCompliance.MET: StatusTone.GOOD,
    SloCompliance.MISSED: StatusTone.BAD,
    SloCompliance.UNKNOWN: StatusTone.WARN,
}


@dataclass(frozen=True)
class StatusLine:
    """A label and its text."""

    label: str
    text: str
    tone: StatusTone = StatusTone.PLAIN


@dataclass(frozen=True)
class SloStanding:
    """Whether the current configuration meets the SLO, and how that is known."""

    compliance: SloCompliance
    text: str


def status_lines(facts: ServiceFacts) -> list[StatusLine]:
    """The lines, the most important first."""
    slo = slo_standing(facts)
    lines = [
        *_standing(facts),
        StatusLine("SLO", f"{slo.compliance}: {slo.text}", _TONES[slo.compliance]),
        _last_decision(facts),
        *_last_window(facts),
        _probation(facts),
        _rollback(facts),
        _next_window(facts),
    ]
    if facts.watched is not None:
        lines = [*_standing(facts), *_watched(facts)]
    lines += [
        StatusLine("learned", f"{r.kind} {setting(r.value, r.kind)} until {when(r.expires_at)}: {r.reason}")
        for r in facts.rules
    ]
    return [*lines, StatusLine("do now", next_action(facts, slo.compliance), StatusTone.PLAIN)]


def ago(at: float, now: float) -> str:
    """ "2026-11-29 07:50:04 UTC (12 min ago)"."""
    return f"{when(at)} ({_span(now - at)} ago)"


def _span(seconds: float) -> str:
    return f"{seconds / 86400:.0f} days" if seconds >= 2 * 86400 else duration(max(seconds, 0.0))


def _standing(facts: ServiceFacts) -> Iterator[StatusLine]:
    """What is running; if nothing is, how the last sidecar ended."""
    record, serving = facts.state, facts.serving
    halted = record is None or record.state == State.HALTED
    if facts.pid is None:
        yield StatusLine("sidecar", _ended(facts), StatusTone.BAD if not halted else StatusTone.WARN)
        if serving is not None:
            text = f"{serving.name} still serves at {serving.address}, without a sidecar"
            yield StatusLine("serving", text, StatusTone.WARN)
        return
    if record is None or halted:
        tunes = facts.run is not None and facts.run.ended_at is None
        doing = "`sloguard tune`, not serving" if tunes else "starting or stopping"
        yield StatusLine("sidecar", f"process {facts.pid}, {doing}", StatusTone.WARN)
        return
    good = record.state == State.SERVING
    if serving is not None and good:
        since = f"since {when(serving.since)} ({_span(facts.now - serving.since)})"
        yield StatusLine("serving", f"{serving.name} at {serving.address}, {since}", StatusTone.GOOD)
    elif not good:
        ends = f"; the window ends at {when(record.until)}" if record.until is not None else ""
        yield StatusLine("serving", f"nothing: {record.state}{ends}", StatusTone.WARN)
    decided = facts.run is not None and facts.run.decision is not None and facts.run.decision.reason == record.reason
    why = "" if decided else f": {record.reason}"  # a line of its own has the last decision
    yield StatusLine("sidecar", f"process {facts.pid}, {record.state} since {when(record.at)}{why}")


def _ended(facts: ServiceFacts) -> str:
    record = facts.state
    if record is None:
        return "not running; `sloguard serve` has never run on this state folder"
    if record.state == State.HALTED:
        return f"not running; it ended {ago(record.at, facts.now)}: {record.reason}"
    last = f"its last state was {record.state} since {when(record.at)}: {record.reason}"
    return f"not running; it was killed, or the machine went down; {last}"


def slo_standing(facts: ServiceFacts) -> SloStanding:
    """From users' requests if there were enough; else from the last measurement of this configuration."""
    if facts.served_slo is not None and facts.state is not None and facts.state.state == State.SERVING:
        report = facts.served_slo.report
        if report.compliance is not SloCompliance.UNKNOWN:
            return SloStanding(report.compliance, _from_users(report))
    measured = last_measurement(facts)
    users = "too few user requests"
    if measured is None:
        return SloStanding(SloCompliance.UNKNOWN, f"{users}, and this configuration was not measured yet")
    of = f"trial {measured.number} of run {measured.run}"
    at = ago(measured.ended_at or measured.started_at, facts.now)
    if measured.status is TrialStatus.FEASIBLE:
        return SloStanding(SloCompliance.MET, f"as measured in {of}, {at}; {users} since")
    if measured.status is TrialStatus.CRASHED:
        return SloStanding(SloCompliance.MISSED, f"the current configuration crashed in {of}, {at}")
    return SloStanding(SloCompliance.MISSED, f"{_missed_limits(facts, measured) or 'a limit was missed'}; {of}, {at}")


def _missed_limits(facts: ServiceFacts, trial: Trial) -> str:
    """ "ITL p99 84 ms (limit 60 ms)", for each limit that ``trial`` missed."""
    measurement = trial.result.measurement if trial.result is not None else None
    if measurement is None or facts.setup is None:
        return ""
    missed = [
        limit for limit in slo_limits(measurement, facts.setup.slo) if limit.excess and limit.measured is not None
    ]
    return ", ".join(_limit(LimitCompliance(limit.name, limit.limit, limit.measured)) for limit in missed)


def _from_users(report: ComplianceReport) -> str:
    rate = "" if report.rate is None else f" ({report.rate:.3g}/s)"
    head = f"{plural(report.requests, 'request')} of users{rate} in the last {duration(report.over_s)}"
    worst = [limit for limit in report.limits if limit.missed] or list(report.limits)
    return f"{head}; {', '.join(map(_limit, worst))}"


def _limit(limit: LimitCompliance) -> str:
    measured, most = (measured_text(limit.name, value) for value in (limit.measured, limit.limit))
    return f"{LIMITS[limit.name]} {measured} (limit {most})"


def last_measurement(facts: ServiceFacts) -> Trial | None:
    """The last trial that measured the current configuration with the full load; None if the last run has none."""
    decision = facts.run.decision if facts.run else None
    promoted = decision is not None and decision.outcome is Outcome.PROMOTED
    current = facts.promotion
    if promoted and current is not None and facts.run is not None and current.run == facts.run.id:
        roles: tuple[Role, ...] = (Role.VALIDATION,)
    elif promoted:
        return None  # rolled back since, so the run's incumbent is current again
    else:
        roles = (Role.BASELINE, Role.REFERENCE)
    found = [t for t in facts.trials if t.plan.role in roles and t.status in RAN_STATUSES]
    return found[-1] if found else None


def _last_decision(facts: ServiceFacts) -> StatusLine:
    run = facts.run
    if run is None:
        return StatusLine("last decision", "none: no tuning run yet", StatusTone.QUIET)
    if run.decision is None:
        doing = "in progress" if facts.pid is not None else "interrupted"
        return StatusLine("last decision", f"none yet: run {run.id} is {doing}, {_count(facts)}", StatusTone.WARN)
    tones = {Outcome.PROMOTED: StatusTone.GOOD, Outcome.KEPT: StatusTone.PLAIN, Outcome.WORSE: StatusTone.PLAIN}
    at = f", {ago(run.ended_at, facts.now)}" if run.ended_at is not None else ""
    text = f"{OUTCOMES[run.decision.outcome]} (run {run.id}, {_count(facts)}{at}): {run.decision.reason}"
    return StatusLine("last decision", text, tones.get(run.decision.outcome, StatusTone.WARN))


def _count(facts: ServiceFacts) -> str:
    return plural(len(facts.trials), "trial")


def _last_window(facts: ServiceFacts) -> Iterator[StatusLine]:
    """Only if it says more than the last decision."""
    window, decision = facts.last_window, facts.run.decision if facts.run else None
    if window is None or (decision is not None and window.reason == decision.reason):
        return
    yield StatusLine("last window", f"{window.outcome}, {ago(window.at, facts.now)}: {window.reason}", StatusTone.WARN)


def _probation(facts: ServiceFacts) -> StatusLine:
    if facts.probation_until is not None and facts.promotion is not None:
        left = duration(facts.probation_until - facts.now)
        text = f"promotion {facts.promotion.id} until {when(facts.probation_until)} ({left} left)"
        return StatusLine("probation", text, StatusTone.WARN)
    if facts.promotion is None:
        return StatusLine("probation", "none", StatusTone.QUIET)
    return StatusLine("probation", f"of promotion {facts.promotion.id}: {facts.probation}", StatusTone.QUIET)


def _rollback(facts: ServiceFacts) -> StatusLine:
    undone = facts.last_rollback
    if undone is None or undone.rolled_back_at is None:
        return StatusLine("rollback", "none", StatusTone.QUIET)
    at, why = ago(undone.rolled_back_at, facts.now), undone.rollback_reason or "no reason was recorded"
    return StatusLine("rollback", f"promotion {undone.id}, {at}: {why}", StatusTone.WARN)


def _next_window(facts: ServiceFacts) -> StatusLine:
    if facts.paused is not None:
        reason = f": {facts.paused.reason}" if facts.paused.reason else ""
        return StatusLine("next window", f"paused since {when(facts.paused.at)}{reason}", StatusTone.WARN)
    if facts.next_window_at is not None:
        left = _span(facts.next_window_at - facts.now)
        return StatusLine("next window", f'{when(facts.next_window_at)}, in {left} (window.cron "{facts.cron}")')
    why = "window.cron is not set" if facts.config_known else f"unknown without the file: -c {_FILE}"
    return StatusLine("next window", f"none is scheduled ({why})" if facts.config_known else why, StatusTone.QUIET)


def _watched(facts: ServiceFacts) -> Iterator[StatusLine]:
    report = facts.watched
    if report is None:
        return
    found = report.compliance
    answers = "answers" if report.answers else "does not answer"
    yield StatusLine("vLLM", f"{report.address} {answers}", StatusTone.GOOD if report.answers else StatusTone.BAD)
    text = f"{found.compliance}: {_from_users(found)}" if found.limits else f"{found.compliance}: {_few(found)}"
    yield StatusLine("SLO", text, _TONES[found.compliance])
    for one in report.advice:
        yield StatusLine("advice", ADVICE_TEXTS[one])


def _few(report: ComplianceReport) -> str:
    return f"{plural(report.requests, 'request')} of users in the last {duration(report.over_s)}"


def next_action(facts: ServiceFacts, compliance: SloCompliance) -> str:
    """What the operator should do now, in one sentence with its command."""
    if facts.watched is not None:
        return "follow the advice, if there is any; a vLLM that is only watched is never changed"
    if facts.pid is None:
        engine = "it takes the running vLLM over" if facts.serving else "it starts vLLM"
        return f"run `sloguard serve -c {_FILE}`: {engine}"
    if facts.state is None or facts.state.state != State.SERVING:
        return _while_away(facts.state.state if facts.state is not None else State.HALTED)
    if facts.paused is not None:
        return "run `sloguard resume` when windows may open again"
    return _while_serving(facts, compliance)


def _while_away(state: str) -> str:
    if state in IN_A_WINDOW:
        return "nothing: service is restored when the window ends; `sloguard abort` ends it early"
    if state in COMING_UP:
        return "wait until vLLM is up; if it does not start, read the newest log in the state folder's logs"
    return "nothing: wait until it is done"


def _while_serving(facts: ServiceFacts, compliance: SloCompliance) -> str:
    outcome = facts.run.decision.outcome if facts.run and facts.run.decision else None
    if facts.probation_until is not None:
        return (
            "nothing: the promotion is rolled back automatically if users' latencies get worse;"
            " `sloguard rollback` undoes it now"
        )
    if facts.run is None:
        return f"{_RETUNE} when the service may be down for a while (`sloguard plan` says how long)"
    if outcome in (Outcome.INTERRUPTED, Outcome.ABANDONED):
        return f"{_RETUNE} to repeat the run that was cut off"
    if compliance is SloCompliance.MISSED:
        return _with_missed_slo(facts)
    if outcome is Outcome.INCONCLUSIVE:
        return " ".join(("no action needed.", *facts.advice))
    return "nothing"


def _with_missed_slo(facts: ServiceFacts) -> str:
    measured = last_measurement(facts)
    if measured is not None and measured.status is TrialStatus.CRASHED:
        return f"find out why the current configuration crashed: `sloguard report -c {_FILE} -o report.html`"
    return " ".join(facts.advice) or f"{_RETUNE} when the service may be down for a while"
