"""The dashboard of the service: SLO attainment, promotions and problems."""

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import DynamicConfigValue
from panels import (
    LATENCIES,
    SLO_LINE,
    against_limit,
    bars,
    board_of,
    configuration,
    counted,
    filled,
    graph,
    kv_cache_panel,
    mapping,
    query,
    rate,
    series,
    state_panel,
    steps,
    value,
    vllm,
)

JUDGED, MISSED = "sloguard_slo_requests_total", "sloguard_slo_misses_total"
BUDGET = "sloguard_slo_error_budget_ratio"


def board() -> dashboard.Dashboard:
    """The whole dashboard."""
    return board_of(
        "vllm-sloguard: serving",
        "vllm-sloguard-serving",
        "SLO attainment, current configuration and problems of the serving engine.",
        "now-6h",
        (_now, _slo, _latencies, _promotion, _trouble, _engine, _plugin),
    )


def _now(to: dashboard.Dashboard) -> dashboard.Dashboard:
    up = mapping({"0": ("down", "red"), "1": ("up", "green")})
    engine = filled(value("Engine", "Running and responding.", units.NoUnit, query(series("sloguard_engine_up"))))
    kept = value(
        "SLO attainment since promotion",
        "Share of users' requests that met every limit.",
        units.PercentUnit,
        query(f"1 - {series(MISSED, objective='any')} / ({series(JUDGED, objective='any')} > 0)"),
    )
    kept = filled(kept.thresholds(steps({0.0: "red", 0.99: "green"})).decimals(2)).no_value("no requests")
    since = query(f"time() - ({series('sloguard_serving_configuration_timestamp_seconds')} > 0)")
    probation = query(series("sloguard_probation_remaining_seconds"))
    paused = mapping({"0": ("enabled", "green"), "1": ("paused", "orange")})
    tuning = value("Tuning", "Paused: no window opens until resumed.", units.NoUnit, query(series("sloguard_paused")))
    scheduled = f"clamp_min({series('sloguard_next_window_timestamp_seconds')} - time(), 0)"
    coming = query(f"{scheduled} * on (job, instance) (1 - {series('sloguard_paused')})")
    following = value("Next window in", "By window.cron; none while paused.", units.DurationSeconds, coming)
    over = mapping({"0": ("none", "blue")})
    return (
        to.with_row(dashboard.Row("Now"))
        .with_panel(state_panel().span(8))
        .with_panel(engine.mappings([up]).span(2))
        .with_panel(kept.span(3))
        .with_panel(value("Configuration unchanged for", "Under this sidecar.", units.DurationSeconds, since).span(3))
        .with_panel(
            value("Probation left", "Of the last promotion.", units.DurationSeconds, probation).mappings([over]).span(2)
        )
        .with_panel(filled(tuning.mappings([paused])).span(3))
        .with_panel(following.mappings([over]).span(3))
    )


def _slo(to: dashboard.Dashboard) -> dashboard.Dashboard:
    def burn(window: str) -> str:
        missed, judged = (f"rate({series(m)}[{window}])" for m in (MISSED, JUDGED))
        return f"({missed} / {judged}) / on (job, instance, objective) {series(BUDGET)}"

    attained = f"1 - rate({series(MISSED)}[$__rate_interval]) / rate({series(JUDGED)}[$__rate_interval])"
    missed, judged = (f"increase({series(m)}[$__range])" for m in (MISSED, JUDGED))
    left = f"1 - {missed} / (({judged} > 0) * on (job, instance, objective) {series(BUDGET)})"
    burning = graph(
        "SLO burn rate over the last hour",
        "At 1, misses are as frequent as the SLO allows. Alerts: page above 14.4, ticket above 6.",
        units.NoUnit,
        query(burn("1h"), "{{objective}}"),
        query("vector(14.4)", "page"),
        query("vector(6)", "ticket"),
    )
    alert_lines = [("page", "red"), ("ticket", "orange")]
    for name, color in alert_lines:
        line = [*SLO_LINE[1:], DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color})]
        burning = burning.override_by_name(name, line)
    attainment = graph(
        "SLO attainment",
        "Share of users' requests that met each objective.",
        units.PercentUnit,
        query(attained, "{{objective}}"),
    )
    return (
        to.with_row(dashboard.Row("SLO: users' requests"))
        .with_panel(burning.span(10))
        .with_panel(attainment.max(1).span(8))
        .with_panel(
            bars(
                "Error budget left",
                "Over the time range. 100 %: no misses; below 0: more misses than the SLO allows.",
                units.PercentUnit,
                query(left, "{{objective}}", instant=True),
            )
            .min(-1)
            .max(1)
            .thresholds(steps({0.0: "green"}, base="red"))
            .span(6)
        )
    )


def _latencies(to: dashboard.Dashboard) -> dashboard.Dashboard:
    to = to.with_row(
        dashboard.Row("Latencies against their limits (purple: tuning window, green: configuration changed)")
    )
    about = "Users: estimated from histogram buckets. Incumbent's trial, p99: measured by the load client."
    for latency, name in LATENCIES.items():
        bucket = series(f"sloguard_request_{latency}_seconds_bucket", traffic="serving")
        p99 = query(f"histogram_quantile(0.99, {rate(bucket, 'le')})", "users p99")
        p50 = query(f"histogram_quantile(0.5, {rate(bucket, 'le')})", "users p50")
        promised = query(series("sloguard_trial_p99_seconds", latency=latency, trial="incumbent"), "incumbent's trial")
        panel = graph(f"{name} p99 and p50", about, units.Seconds, p99, p50, promised)
        to = to.with_panel(against_limit(panel, latency).span(6))
    judged, missed = (f"sum (rate({series(m, objective='any')}[$__rate_interval]))" for m in (JUDGED, MISSED))
    requests = graph(
        "Throughput", "Users' requests, and those within the SLO (goodput).", units.RequestsPerSecond,
        query(judged, "requests"), query(f"{judged} - {missed}", "within the SLO"),
    )  # fmt: skip
    tokens = graph(
        "Output tokens", "Generated by vLLM.", units.Short, query(rate(vllm("generation_tokens_total")), "generated")
    )
    return to.with_panel(requests.span(12)).with_panel(tokens.axis_label("tokens/s").span(12))


def _promotion(to: dashboard.Dashboard) -> dashboard.Dashboard:
    kept = query(f"1 - {series(MISSED)} / ({series(JUDGED)} > 0)", "{{objective}}", instant=True)
    shares = bars(
        "p99 since promotion, relative to its limit",
        "Users' requests under the current configuration. 100 % is the limit.",
        units.PercentUnit,
    )
    for latency, name in LATENCIES.items():
        bucket = series(f"sloguard_request_{latency}_seconds_bucket", traffic="serving")
        limit = series("sloguard_slo_limit_seconds", latency=latency, statistic="p99")
        share = f"histogram_quantile(0.99, sum by (le) ({bucket})) / scalar({limit})"
        shares = shares.with_target(query(share, name, instant=True))
    return (
        to.with_row(dashboard.Row("Current configuration, since its promotion or the start of the sidecar"))
        .with_panel(
            bars("SLO attainment since promotion by objective", "Share of users' requests.", units.PercentUnit, kept)
            .max(1)
            .decimals(2)
            .thresholds(steps({0.99: "green"}, base="red"))
            .span(6)
        )
        .with_panel(shares.max(2).thresholds(steps({1.0: "red"}, base="green")).span(6))
        .with_panel(
            configuration(
                "Current configuration",
                "Engine arguments, after repairs; promotion is its number, none for the file's own arguments.",
                "sloguard_serving_configuration_info",
            ).span(6)
        )
        .with_panel(
            configuration(
                "Promoted configuration",
                "To be served; differs from the current one only until the next start.",
                "sloguard_promoted_configuration_info",
            ).span(6)
        )
    )


def _trouble(to: dashboard.Dashboard) -> dashboard.Dashboard:
    restarts = counted("sloguard_engine_restarts_total", "reason")
    planned = counted("sloguard_engine_planned_restarts_total", "reason")
    crashes = counted("sloguard_crashes_total", "category", traffic="serving")
    rollbacks = counted("sloguard_rollbacks_total", "verdict")
    ended = query(rate(series("sloguard_requests_total", traffic="serving"), "finish_reason"), "{{finish_reason}}")
    return (
        to.with_row(dashboard.Row("Problems"))
        .with_panel(bars("Unplanned engine restarts", "In the time range.", units.Short, restarts).span(4))
        .with_panel(bars("Planned engine restarts", "After windows, in the time range.", units.Short, planned).span(4))
        .with_panel(bars("Engine crashes", "In the time range.", units.Short, crashes).span(4))
        .with_panel(bars("Automatic rollbacks", "In the time range.", units.Short, rollbacks).span(4))
        .with_panel(
            graph(
                "Requests by finish reason",
                "abort: by the client; rejected: never ran.",
                units.RequestsPerSecond,
                ended,
            ).span(8)
        )
    )


def _engine(to: dashboard.Dashboard) -> dashboard.Dashboard:
    queues = graph("Requests in the engine", "In vLLM's scheduler.", units.Short)
    for name in ("running", "waiting"):
        queues = queues.with_target(query(f"sum ({vllm(f'num_requests_{name}')})", name))
    memory = graph("KV cache", "Usage, and prefix cache hit rate.", units.PercentUnit)
    hits = f"{rate(vllm('prefix_cache_hits_total'))} / {rate(vllm('prefix_cache_queries_total'))}"
    memory = memory.with_target(query(f"max ({vllm('kv_cache_usage_perc')})", "in use")).with_target(
        query(hits, "prefix cache hits")
    )
    tokens = graph("Tokens", "Prompt and generated tokens.", units.Short).axis_label("tokens/s")
    for name in ("prompt", "generation"):
        tokens = tokens.with_target(query(rate(vllm(f"{name}_tokens_total")), name))
    latency = graph(
        "p99s in vLLM's metrics", "Estimated from vLLM's buckets, including the sidecar's probes.", units.Seconds
    )
    for metric, name in (
        ("time_to_first_token_seconds", "TTFT"),
        ("inter_token_latency_seconds", "ITL"),
        ("e2e_request_latency_seconds", "E2E"),
        ("request_queue_time_seconds", "queue time"),
    ):
        p99 = f"histogram_quantile(0.99, {rate(vllm(f'{metric}_bucket'), 'le')})"
        latency = latency.with_target(query(p99, name))
    preempted = query(rate(vllm("num_preemptions_total")), "preempted")
    succeeded = query(rate(vllm("request_success_total"), "finished_reason"), "{{finished_reason}}")
    return (
        to.with_row(dashboard.Row("vLLM's metrics"))
        .with_panel(queues.span(8))
        .with_panel(memory.max(1).span(8))
        .with_panel(tokens.span(8))
        .with_panel(latency.span(8))
        .with_panel(
            graph("Preemptions", "Requests preempted because the KV cache was full.", units.Short, preempted)
            .axis_label("per second")
            .span(8)
        )
        .with_panel(graph("Finished requests", "By vLLM's finish reason.", units.RequestsPerSecond, succeeded).span(8))
    )


def _plugin(to: dashboard.Dashboard) -> dashboard.Dashboard:
    losses = graph("Lost telemetry", "Dropped events and errors caught in the plugin.", units.Short)
    for metric, name in (
        ("sloguard_telemetry_dropped_events_total", "dropped events"),
        ("sloguard_plugin_hook_errors_total", "hook errors"),
    ):
        losses = losses.with_target(query(rate(series(metric)), name))
    return (
        to.with_row(dashboard.Row("Guard and plugin"))
        .with_panel(kv_cache_panel().span(12))
        .with_panel(losses.axis_label("per second").span(12))
    )
