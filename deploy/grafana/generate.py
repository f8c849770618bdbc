"""Writes sloguard.json, the dashboard of the sidecar. ``--check`` only says whether the file is up to date."""

import argparse
import json
import sys
from pathlib import Path

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    BigValueColorMode,
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    TimelineValueAlignment,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMapping,
    ValueMappingResult,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from sidecar.states import State

PATH = Path(__file__).with_name("sloguard.json")
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
LATENCIES = {"ttft": "TTFT", "itl": "ITL", "e2e": "E2E"}
COLORS = {
    State.STARTING: "light-blue",
    State.SERVING: "green",
    State.DRAINING: "yellow",
    State.TUNING: "purple",
    State.VALIDATING: "super-light-purple",
    State.PROMOTING: "dark-green",
    State.RESTORING: "orange",
    State.HALTED: "red",
}
SLO_LINE = [
    DynamicConfigValue("color", {"mode": "fixed", "fixedColor": "red"}),
    DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [10, 10]}),
    DynamicConfigValue("custom.fillOpacity", 0),
]


def series(metric: str, **labels: str) -> str:
    """The sidecar's ``metric``, of the instances that are chosen."""
    matchers = ['job=~"$job"', 'instance=~"$instance"', *(f'{name}="{value}"' for name, value in labels.items())]
    return f"{metric}{{{', '.join(matchers)}}}"


def query(expr: str, legend: str = "__auto", *, instant: bool = False) -> prometheus.Dataquery:
    """One query; ``instant`` for panels that show only the present."""
    target = prometheus.Dataquery().expr(expr).legend_format(legend).datasource(SOURCE)
    return target.instant() if instant else target.range()


def board() -> dashboard.Dashboard:
    """The whole dashboard."""
    built = (
        dashboard.Dashboard("vllm-sloguard")
        .uid("vllm-sloguard")
        .description("What the sidecar does to a vLLM engine, and how the engine keeps its latency objectives.")
        .tags(["vllm", "sloguard"])
        .time("now-6h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_choice("job", "label_values(sloguard_build_info, job)"))
        .with_variable(_choice("instance", 'label_values(sloguard_build_info{job=~"$job"}, instance)'))
    )
    for row in (state_row, serving_row, engine_row, search_row, trials_row, guard_row):
        built = row(built)
    return built


def state_row(to: dashboard.Dashboard) -> dashboard.Dashboard:
    """What is going on now."""
    # One number an instance, so that the timeline has one line for each: the states are coded from 1.
    coded = [series("sloguard_state", sloguard_state=s) + f" * {i}" for i, s in enumerate(State, 1)]
    names = {str(i): ValueMappingResult(text=str(s), color=COLORS[s], index=i) for i, s in enumerate(State, 1)}
    timeline = (
        statetimeline.Panel()
        .title("State")
        .description("What the sidecar was doing.")
        .datasource(SOURCE)
        .mappings([_mapping(names)])
        .unit(units.NoUnit)
        .show_value(VisibilityMode.AUTO)
        .align_value(TimelineValueAlignment.CENTER)
        .with_target(query(f"sum by (instance) ({' or '.join(coded)})", "{{instance}}"))
    )
    up = {"0": ValueMappingResult(text="down", color="red"), "1": ValueMappingResult(text="up", color="green")}
    engine = _stat("Serving engine", "Runs and answers.", units.NoUnit, query(series("sloguard_engine_up")))
    left = query(series("sloguard_window_remaining_seconds"))
    budget = query(series("sloguard_budget_remaining_trials"))
    return (
        to.with_row(dashboard.Row("State"))
        .with_panel(timeline.span(12).height(6))
        .with_panel(engine.mappings([_mapping(up)]).color_mode(BigValueColorMode.BACKGROUND).span(4).height(6))
        .with_panel(_stat("Window time left", "0 outside of a window.", units.DurationSeconds, left).span(4).height(6))
        .with_panel(_stat("Trials left", "What is left of the run's budget.", units.Short, budget).span(4).height(6))
    )


def serving_row(to: dashboard.Dashboard) -> dashboard.Dashboard:
    """How the operator's own requests fare against the SLO; the load of trials is not in it."""
    to = to.with_row(dashboard.Row("Serving traffic against the SLO"))
    for latency, name in LATENCIES.items():
        bucket = series(f"sloguard_request_{latency}_seconds_bucket", traffic="serving")
        p99 = f"histogram_quantile(0.99, sum by (instance, le) (rate({bucket}[$__rate_interval])))"
        to = to.with_panel(
            _graph(f"{name} p99", "Estimated from the histogram's buckets.", units.Seconds, query(p99, "{{instance}}"))
            .with_target(_limit(latency))
            .override_by_name("SLO", SLO_LINE)
            .span(6)
        )
    attained = _graph("SLO attainment", "Share of the requests within each limit.", units.PercentUnit)
    attained = attained.max(1).override_by_name("objective", SLO_LINE).with_target(query("vector(0.99)", "objective"))
    for latency, name in LATENCIES.items():
        attained = attained.with_target(query(attainment(latency), f"{name} {{{{instance}}}}"))
    return to.with_panel(attained.span(6))


def attainment(latency: str) -> str:
    """The share within the limit, exact: a bucket ends at it. The limit's value is what finds that bucket."""
    metric = f"sloguard_request_{latency}_seconds"
    bucket = series(f"{metric}_bucket", traffic="serving")
    every = series(f"{metric}_count", traffic="serving")
    limit = series("sloguard_slo_limit_seconds", latency=latency)
    # A bucket's label is "3.0" where PromQL writes the same number "3".
    within = (
        f'label_replace(rate({bucket}[$__rate_interval]), "le", "$1", "le", "([0-9]+)\\\\.0")'
        f' and on (job, instance, le) count_values by (job, instance) ("le", {limit})'
    )
    return f"sum by (instance) ({within}) / sum by (instance) (rate({every}[$__rate_interval]))"


def engine_row(to: dashboard.Dashboard) -> dashboard.Dashboard:
    """The engine's load, of serving and of trials."""
    ended = f"sum by (traffic, finish_reason) (rate({series('sloguard_requests_total')}[$__rate_interval]))"
    preempted = f"sum by (traffic) (rate({series('sloguard_engine_preemptions_total')}[$__rate_interval]))"
    queues = _graph("Requests in the engine", "Running and waiting, as the scheduler last said.", units.Short)
    for name in ("running", "waiting"):
        requests = f"sum by (traffic) ({series(f'sloguard_engine_{name}_requests')})"
        queues = queues.with_target(query(requests, f"{name}, {{{{traffic}}}}"))
    usage = query(f"max by (traffic) ({series('sloguard_engine_kv_cache_usage_ratio')})", "{{traffic}}")
    return (
        to.with_row(dashboard.Row("Engine"))
        .with_panel(queues.span(6))
        .with_panel(_graph("KV cache in use", "1 is full.", units.PercentUnit, usage).max(1).span(6))
        .with_panel(
            _graph("Preemptions", "Requests that lost their KV cache.", units.Short, query(preempted, "{{traffic}}"))
            .axis_label("per second")
            .span(6)
        )
        .with_panel(
            _graph(
                "Requests ended",
                "By vLLM's reason.",
                units.RequestsPerSecond,
                query(ended, "{{traffic}}, {{finish_reason}}"),
            ).span(6)
        )
    )


def search_row(to: dashboard.Dashboard) -> dashboard.Dashboard:
    """What the runs tried and led to, over the dashboard's time range."""
    status = _bars("Trials by status", "In the time range.", units.Short, _counted("sloguard_trials_total", "status"))
    crashes = _counted("sloguard_crashes_total", "category")
    outcome = _counted("sloguard_decisions_total", "outcome")
    spent = f"sum by (part) (increase({series('sloguard_trial_seconds_total')}[$__range]))"
    took = query(series("sloguard_last_duration_seconds"), "{{step}} {{instance}}")
    return (
        to.with_row(dashboard.Row("Tuning"))
        .with_panel(status.span(5))
        .with_panel(_bars("Crashes by category", "Of trials and of serving engines.", units.Short, crashes).span(5))
        .with_panel(_bars("Decisions", "What the runs led to.", units.Short, outcome).span(4))
        .with_panel(
            _bars(
                "Where trial seconds went",
                "Starting engines, loading them, stopping them.",
                units.DurationSeconds,
                query(spent, "{{part}}", instant=True),
            ).span(5)
        )
        .with_panel(_stat("Last drain and restore", "How long they took.", units.Seconds, took).span(5).height(8))
    )


def trials_row(to: dashboard.Dashboard) -> dashboard.Dashboard:
    """The run's last, baseline and best trials."""
    to = to.with_row(dashboard.Row("Trials against the SLO"))
    for latency, name in LATENCIES.items():
        p99 = query(series("sloguard_trial_p99_seconds", latency=latency), "{{trial}}")
        to = to.with_panel(
            _graph(
                f"{name} p99 of trials", "As the load client measured it; failed requests count.", units.Seconds, p99
            )
            .with_target(_limit(latency))
            .override_by_name("SLO", SLO_LINE)
            .span(6)
        )
    objective = query(series("sloguard_trial_objective"), "{{trial}}")
    about = "Higher is better: requests/s within the SLO, or minus the mean latency in milliseconds."
    return to.with_panel(_graph("Objective", about, units.Short, objective).span(6))


def guard_row(to: dashboard.Dashboard) -> dashboard.Dashboard:
    """The guard and the plugin inside vLLM, and what is served now."""
    tokens = query(series("sloguard_kv_cache_tokens"), "{{source}}")
    repairs = query(f"sum by (argument) ({series('sloguard_repairs_total')})", "{{argument}}", instant=True)
    losses = _graph("Telemetry losses", "Events that the plugin dropped, and errors that it caught.", units.Short)
    for metric, name in (
        ("sloguard_telemetry_dropped_events", "dropped"),
        ("sloguard_plugin_hook_errors", "hook errors"),
    ):
        losses = losses.with_target(query(f"sum by (traffic) ({series(metric)})", f"{name}, {{{{traffic}}}}"))
    info = f"sum without (job) ({series('sloguard_serving_configuration_info')})"
    configuration = (
        table.Panel()
        .title("Configuration that is served")
        .description("The engine arguments.")
        .datasource(SOURCE)
        .unit(units.NoUnit)
        .with_target(query(info, instant=True).format(PromQueryFormat.TIME_SERIES))
        .with_transformation(DataTransformerConfig("labelsToFields", options={"mode": "rows"}))
    )
    about = "The guard's estimate before the start, and what vLLM then reported."
    return (
        to.with_row(dashboard.Row("Guard, plugin and configuration"))
        .with_panel(_graph("KV cache tokens", about, units.Short, tokens).span(6))
        .with_panel(_bars("Repairs by argument", "Since the sidecar started.", units.Short, repairs).span(6))
        .with_panel(losses.span(6))
        .with_panel(configuration.span(6).height(8))
    )


def _choice(name: str, values: str) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(name.title()).datasource(SOURCE).query(values)
    variable = variable.multi(True).include_all(True).all_value(".+").refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    return variable.current(VariableOption(selected=True, text="All", value="$__all"))


def _mapping(results: dict[str, ValueMappingResult]) -> ValueMapping:
    return ValueMap(options=results)


def _counted(metric: str, label: str) -> prometheus.Dataquery:
    counted = f"round(sum by ({label}) (increase({series(metric)}[$__range])))"
    return query(counted, f"{{{{{label}}}}}", instant=True)


def _limit(latency: str) -> prometheus.Dataquery:
    return query(f"min({series('sloguard_slo_limit_seconds', latency=latency)})", "SLO")


def _neutral() -> dashboard.ThresholdsConfig:
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps([Threshold(None, "blue")])


def _stat(title: str, about: str, unit: str, target: prometheus.Dataquery) -> stat.Panel:
    panel = stat.Panel().title(title).description(about).datasource(SOURCE).unit(unit).thresholds(_neutral())
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    return panel.graph_mode(BigValueGraphMode.NONE).reduce_options(last).with_target(target)


def _bars(title: str, about: str, unit: str, target: prometheus.Dataquery) -> bargauge.Panel:
    panel = bargauge.Panel().title(title).description(about).datasource(SOURCE).unit(unit).min(0).height(8)
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    panel = panel.orientation(VizOrientation.HORIZONTAL).display_mode(BarGaugeDisplayMode.BASIC)
    return panel.thresholds(_neutral()).reduce_options(last).with_target(target)


def _graph(title: str, about: str, unit: str, *targets: prometheus.Dataquery) -> timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(True)
    legend = legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel = timeseries.Panel().title(title).description(about).datasource(SOURCE).unit(unit).height(8)
    panel = panel.legend(legend).fill_opacity(5).show_points(VisibilityMode.AUTO)
    for target in targets:
        panel = panel.with_target(target)
    return panel


def render() -> str:
    """The file's text. Targets are lettered here, panels numbered."""
    built = board().build()
    for number, panel in enumerate(built.panels or [], 1):
        panel.id_val = number
    content = json.loads(json.dumps(built, cls=JSONEncoder))
    for panel in content["panels"]:
        for letter, target in zip("ABCDEFGH", panel.get("targets", []), strict=False):
            target["refId"] = letter
    return json.dumps(content, indent=2) + "\n"


def main() -> int:
    """0 when the file is, or was already, up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the file is stale")
    if not parser.parse_args().check:
        PATH.write_text(render(), encoding="utf-8")
        return 0
    if PATH.is_file() and PATH.read_text(encoding="utf-8") == render():
        return 0
    print(f"{PATH.name} is stale: run {Path(__file__).name}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
