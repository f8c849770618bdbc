"""The dashboard of tuning windows: their trials, decisions and time."""

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.common import BigValueTextMode
from panels import (
    LATENCIES,
    against_limit,
    bars,
    board_of,
    by_trial,
    counted,
    graph,
    kv_cache_panel,
    mapping,
    named,
    query,
    series,
    stacked,
    state_panel,
    timeline,
    value,
)

STATUS_COLORS = {"feasible": "green", "infeasible": "yellow", "crashed": "red", "refused": "purple", "aborted": "gray"}


def board() -> dashboard.Dashboard:
    """The whole dashboard."""
    return board_of(
        "vllm-sloguard: tuning window",
        "vllm-sloguard-tuning",
        "Trials, decisions and time of tuning windows.",
        "now-3h",
        (_now, _trials, _latencies, _seconds, _decisions, _guard, _engine),
    )


def _now(to: dashboard.Dashboard) -> dashboard.Dashboard:
    left = query(series("sloguard_window_remaining_seconds"))
    budget = query(series("sloguard_budget_remaining_trials"))
    number = value("Trial under way", "Its number in the run.", units.Short, query(series("sloguard_trial_number")))
    return (
        to.with_row(dashboard.Row("Now"))
        .with_panel(state_panel().span(12))
        .with_panel(
            value("Window time left", "Until vLLM must serve again.", units.DurationSeconds, left)
            .mappings([mapping({"0": ("no window", "blue")})])
            .span(4)
        )
        .with_panel(
            value("Trials left", "In the budget of the run; the validation is not counted.", units.Short, budget).span(
                4
            )
        )
        .with_panel(number.mappings([mapping({"0": ("none", "blue")})]).span(4))
    )


def _trials(to: dashboard.Dashboard) -> dashboard.Dashboard:
    ended = f"sum by (status) ({series('sloguard_trials_total')})"
    earlier = f"sum by (status) ({series('sloguard_trials_total')} offset $__interval)"
    verdicts = graph(
        "Trials by state, as they end",
        "Feasible: met the SLO; infeasible: missed it; refused: not started, by decision of the guard.",
        units.Short,
        query(f"clamp_min({ended} - {earlier}, 0) > 0", "{{status}}"),
    )
    number = query(f"{series('sloguard_trial_number')} > 0", "trial")
    numbers = timeline("Running trial", "Its number in the run.", number)
    return (
        to.with_row(dashboard.Row("Trials over time"))
        .with_panel(stacked(verdicts, STATUS_COLORS).decimals(0).span(24).height(6))
        .with_panel(numbers.span(24).height(4))
    )


def _latencies(to: dashboard.Dashboard) -> dashboard.Dashboard:
    to = to.with_row(dashboard.Row("Trials against the SLO, incumbent and best"))
    about = "Measured by the load client. Gaps: crashed trials, or too many failed requests for a p99."
    for latency, name in LATENCIES.items():
        p99 = query(series("sloguard_trial_p99_seconds", latency=latency), "{{trial}}")
        to = to.with_panel(
            against_limit(by_trial(graph(f"{name} p99 of trials", about, units.Seconds, p99)), latency).span(6)
        )
    mean = query(series("sloguard_trial_e2e_mean_seconds"), "{{trial}}")
    goodput = query(series("sloguard_trial_goodput_requests_per_second"), "{{trial}}")
    latency = graph(
        "Mean latency of trials", "Lower is better; minimized with `objective: latency`.", units.Seconds, mean
    )
    rate = graph(
        "Goodput or capacity of trials",
        "Higher is better: requests/s that met the SLO; with `objective: capacity`, the highest rate that met it.",
        units.RequestsPerSecond,
        goodput,
    )
    return to.with_panel(by_trial(latency).span(12)).with_panel(by_trial(rate).span(12))


def _seconds(to: dashboard.Dashboard) -> dashboard.Dashboard:
    spent = f"sort_desc(sum by (activity) (increase({series('sloguard_window_spent_seconds_total')}[$__range])))"
    durations = "sloguard_trial_duration_seconds"
    mean = f"sum by (status) ({series(f'{durations}_sum')}) / (sum by (status) ({series(f'{durations}_count')}) > 0)"
    crashes = counted("sloguard_crashes_total", "category", traffic="trial")
    return (
        to.with_row(dashboard.Row("Time and crashes"))
        .with_panel(
            bars(
                "Time spent in windows",
                "In the time range. Decide: search, guard and journal between trials.",
                units.DurationSeconds,
                query(spent, "{{activity}}", instant=True),
            ).span(8)
        )
        .with_panel(
            bars(
                "Mean duration of trials by state",
                "Since the sidecar started.",
                units.DurationSeconds,
                query(mean, "{{status}}", instant=True),
            ).span(8)
        )
        .with_panel(bars("Crashes of trials by category", "In the time range.", units.Short, crashes).span(8))
    )


def _decisions(to: dashboard.Dashboard) -> dashboard.Dashboard:
    windows = counted("sloguard_windows_total", "outcome")
    decisions = counted("sloguard_decisions_total", "outcome")
    low, estimate, high = (
        query(series("sloguard_decision_gain_ratio", bound=b), b) for b in ("low", "estimate", "high")
    )
    gain = value(
        "Gain of the last candidate over the incumbent",
        "In the objective, with its confidence interval; empty without a comparison.",
        units.PercentUnit,
        low,
    )
    optimized = query(series("sloguard_model_info"), "{{objective}}")
    objective = value("Objective", "What is optimized.", units.NoUnit, optimized).text_mode(BigValueTextMode.NAME)
    gain = named(gain.with_target(estimate).with_target(high))
    took = [
        query(
            f"{series(f'sloguard_{step}_duration_seconds_sum')} / {series(f'sloguard_{step}_duration_seconds_count')}",
            step,
        )
        for step in ("drain", "restore")
    ]
    durations = value("Mean drain and restore", "Since the sidecar started.", units.DurationSeconds, took[0])
    return (
        to.with_row(dashboard.Row("Decisions"))
        .with_panel(gain.span(7))
        .with_panel(objective.span(3))
        .with_panel(bars("Decisions", "In the time range.", units.Short, decisions).height(5).span(4))
        .with_panel(bars("Windows by outcome", "In the time range.", units.Short, windows).height(5).span(5))
        .with_panel(named(durations.with_target(took[1])).span(5))
    )


def _guard(to: dashboard.Dashboard) -> dashboard.Dashboard:
    ratio = "sloguard_guard_kv_cache_prediction_ratio"
    mean = query(f"{series(f'{ratio}_sum')} / {series(f'{ratio}_count')}")
    repairs = counted("sloguard_repairs_total", "rule")
    return (
        to.with_row(dashboard.Row("Guard"))
        .with_panel(kv_cache_panel().span(10))
        .with_panel(
            value("KV cache: predicted / reported", "Mean of all starts; 1 is exact.", units.NoUnit, mean)
            .decimals(3)
            .height(8)
            .span(4)
        )
        .with_panel(bars("Repairs by rule", "In the time range.", units.Short, repairs).span(10))
    )


def _engine(to: dashboard.Dashboard) -> dashboard.Dashboard:
    queues = graph("Requests in the trial engine", "As last reported by its scheduler.", units.Short)
    for name in ("running", "waiting"):
        queues = queues.with_target(query(series(f"sloguard_engine_{name}_requests", traffic="trial"), name))
    usage = query(series("sloguard_engine_kv_cache_usage_ratio", traffic="trial"), "in use")
    return (
        to.with_row(dashboard.Row("Trial engine"))
        .with_panel(queues.span(12))
        .with_panel(
            graph("KV cache in use, trial engine", "vLLM preempts requests when it is full.", units.PercentUnit, usage)
            .max(1)
            .span(12)
        )
    )
