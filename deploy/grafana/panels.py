"""The parts of both dashboards: queries that use the variables, and panels of one style."""

from collections.abc import Callable, Mapping, Sequence

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
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    GraphDrawStyle,
    LegendDisplayMode,
    LegendPlacement,
    LineInterpolation,
    StackingMode,
    TimelineValueAlignment,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
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

from sidecar.record.states import State

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
# The label "latency" of limits and of the trials' percentiles.
LATENCIES = {"ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2e": "E2E"}
STATE_COLORS = {
    State.STARTING: "light-blue",
    State.SERVING: "green",
    State.DRAINING: "yellow",
    State.TUNING: "purple",
    State.VALIDATING: "super-light-purple",
    State.PROMOTING: "dark-green",
    State.RESTORING: "orange",
    State.HALTED: "red",
}
# The variable is a host, or a name that both scrape jobs share: the sidecar and vLLM differ in their ports.
INSTANCE = 'instance=~"${instance:regex}(:[0-9]+)?"'
SLO_LINE = [
    DynamicConfigValue("color", {"mode": "fixed", "fixedColor": "red"}),
    DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [10, 10]}),
    DynamicConfigValue("custom.fillOpacity", 0),
]


def series(metric: str, **labels: str) -> str:
    """``metric`` of the selected sidecar."""
    return _selector(metric, labels)


def vllm(metric: str) -> str:
    """``metric`` of the serving engine of the selected sidecar, by its name in vLLM."""
    return f'vllm:{metric}{{model_name=~"$model", {INSTANCE}}}'


def _selector(metric: str, labels: Mapping[str, str]) -> str:
    own = ['job=~"$job"', INSTANCE, *(f'{name}="{value}"' for name, value in labels.items())]
    return f"{metric}{{{', '.join(own)}}}"


def rate(selector: str, by: str = "") -> str:
    """The sum of rates over Grafana's rate interval."""
    return f"sum{f' by ({by})' if by else ''} (rate({selector}[$__rate_interval]))"


def query(expr: str, legend: str = "__auto", *, instant: bool = False) -> prometheus.Dataquery:
    """One query; ``instant`` for panels that only show the latest value."""
    target = prometheus.Dataquery().expr(expr).legend_format(legend).datasource(SOURCE)
    return target.instant() if instant else target.range()


def counted(metric: str, label: str, **labels: str) -> prometheus.Dataquery:
    """Increase over the time range by ``label``, without zeros; "none" if all are zero and the sidecar is scraped."""
    found = f"sort_desc(round(sum by ({label}) (increase({series(metric, **labels)}[$__range])))) > 0"
    none = f'label_replace(0 * max({series("sloguard_paused")}), "{label}", "none", "", "")'
    expr = f"({found}) or on () {none}"
    return query(expr, f"{{{{{label}}}}}", instant=True)


def limit(latency: str) -> prometheus.Dataquery:
    """The line of the SLO limit."""
    return query(f"min({series('sloguard_slo_limit_seconds', latency=latency, statistic='p99')})", "SLO")


AddRow = Callable[[dashboard.Dashboard], dashboard.Dashboard]


def board_of(title: str, uid: str, about: str, since: str, rows: Sequence[AddRow]) -> dashboard.Dashboard:
    """A dashboard of ``rows``, each of which adds itself, with the common variables and annotations."""
    windows = f"{series('sloguard_window_remaining_seconds')} > 0"
    # Two steps wide, however long the range is: a scrape and a step may each come so late.
    age = f"time() - {series('sloguard_serving_configuration_timestamp_seconds')}"
    changed = f"({age}) < 2 * $__interval_ms / 1000"
    built = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(about)
        .tags(["vllm", "sloguard"])
        .time(since, "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_choice("job", "label_values(sloguard_model_info, job)"))
        .with_variable(_choice("model", 'label_values(sloguard_model_info{job=~"$job"}, model)'))
        .with_variable(_instance())
        .annotation(_mark("Tuning window", windows, "purple"))
        .annotation(_mark("Configuration changed", changed, "green"))
        .link(_link())
    )
    for row in rows:
        built = row(built)
    return built


def _choice(name: str, values: str) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(name.title()).datasource(SOURCE).query(values)
    variable = variable.multi(True).include_all(True).all_value(".+").refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    return variable.current(VariableOption(selected=True, text="All", value="$__all"))


def _instance() -> dashboard.QueryVariable:
    """The sidecar to show, one at a time."""
    values = 'label_values(sloguard_model_info{job=~"$job", model=~"$model"}, instance)'
    variable = dashboard.QueryVariable("instance").label("Instance").datasource(SOURCE).query(values)
    return variable.regex("/^(.*?)(:[0-9]+)?$/").refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)


def _mark(name: str, expr: str, color: str) -> dashboard.AnnotationQuery:
    return dashboard.AnnotationQuery().name(name).datasource(SOURCE).expr(expr).enable(True).icon_color(color)


def _link() -> dashboard.DashboardLink:
    """A link to the other dashboard, for the same sidecar and time range."""
    link = dashboard.DashboardLink("sloguard").type(DashboardLinkType.DASHBOARDS).tags(["sloguard"])
    return link.include_vars(True).keep_time(True)


def mapping(results: Mapping[str, tuple[str, str]]) -> ValueMapping:
    """Values mapped to (text, color)."""
    shown = {
        value: ValueMappingResult(text=text, color=color, index=index)
        for index, (value, (text, color)) in enumerate(results.items())
    }
    return ValueMap(options=shown)


def state_panel() -> statetimeline.Panel:
    """The sidecar's state over time; states are numbered from 1."""
    coded = [series("sloguard_state", sloguard_state=s) + f" * {i}" for i, s in enumerate(State, 1)]
    names = {str(i): (str(s), STATE_COLORS[s]) for i, s in enumerate(State, 1)}
    state = query(f"max ({' or '.join(coded)})", "state")
    return timeline("State of the sidecar", "What it was doing.", state).mappings([mapping(names)])


def kv_cache_panel() -> timeseries.Panel:
    """The KV cache of the last engine, predicted and reported."""
    about = "Tokens: the guard's prediction before the start, and vLLM's report."
    tokens = query(series("sloguard_kv_cache_tokens"), "{{source}}")
    return graph("KV cache of the last engine", about, units.Short, tokens).axis_label("tokens")


def timeline(title: str, about: str, *targets: prometheus.Dataquery) -> statetimeline.Panel:
    """A timeline of values as blocks."""
    panel = statetimeline.Panel().title(title).description(about).datasource(SOURCE).unit(units.NoUnit).height(5)
    panel = panel.show_value(VisibilityMode.AUTO).align_value(TimelineValueAlignment.CENTER)
    for target in targets:
        panel = panel.with_target(target)
    return panel


def value(title: str, about: str, unit: str, target: prometheus.Dataquery) -> stat.Panel:
    """The latest value as a number."""
    panel = stat.Panel().title(title).description(about).datasource(SOURCE).unit(unit).thresholds(steps({}))
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    panel = panel.graph_mode(BigValueGraphMode.NONE).reduce_options(last).height(5).no_value("no data")
    return panel.with_target(target)


def named(panel: stat.Panel) -> stat.Panel:
    """Shows the legend beside the number."""
    return panel.text_mode(BigValueTextMode.VALUE_AND_NAME)


def filled(panel: stat.Panel) -> stat.Panel:
    """Uses the color as the background."""
    return panel.color_mode(BigValueColorMode.BACKGROUND)


def bars(title: str, about: str, unit: str, *targets: prometheus.Dataquery) -> bargauge.Panel:
    """Bars to compare numbers."""
    panel = bargauge.Panel().title(title).description(about).datasource(SOURCE).unit(unit).min(0).height(8)
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    panel = panel.orientation(VizOrientation.HORIZONTAL).display_mode(BarGaugeDisplayMode.BASIC).no_value("no data")
    panel = panel.thresholds(steps({})).reduce_options(last)
    for target in targets:
        panel = panel.with_target(target)
    return panel


def graph(title: str, about: str, unit: str, *targets: prometheus.Dataquery) -> timeseries.Panel:
    """Lines over time."""
    legend = common.VizLegendOptions().show_legend(True)
    legend = legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel = timeseries.Panel().title(title).description(about).datasource(SOURCE).unit(unit).height(8).min(0)
    panel = panel.legend(legend).fill_opacity(5).show_points(VisibilityMode.AUTO)
    for target in targets:
        panel = panel.with_target(target)
    return panel


def stacked(panel: timeseries.Panel, colors: Mapping[str, str]) -> timeseries.Panel:
    """Stacked bars, each with its color."""
    panel = panel.draw_style(GraphDrawStyle.BARS).fill_opacity(100).line_width(0)
    panel = panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    for name, color in colors.items():
        panel = panel.override_by_name(name, [DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color})])
    return panel


def against_limit(panel: timeseries.Panel, latency: str) -> timeseries.Panel:
    """Adds the SLO limit as a dashed line."""
    return panel.with_target(limit(latency)).override_by_name("SLO", SLO_LINE)


def configuration(title: str, about: str, metric: str) -> table.Panel:
    """The labels of an info metric, one per row."""
    info = f"sum without (job, instance) ({series(metric)})"
    return (
        table.Panel()
        .title(title)
        .description(about)
        .datasource(SOURCE)
        .unit(units.NoUnit)
        .height(8)
        .with_target(query(info, instant=True).format(PromQueryFormat.TIME_SERIES))
        .with_transformation(DataTransformerConfig("labelsToFields", options={"mode": "rows"}))
    )


def by_trial(panel: timeseries.Panel) -> timeseries.Panel:
    """Steps from trial to trial, with fixed colors for the incumbent and the best."""
    panel = panel.line_interpolation(LineInterpolation.STEP_AFTER)
    for name, color in {"incumbent": "orange", "best": "green", "last": "light-blue"}.items():
        panel = panel.override_by_name(name, [DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color})])
    return panel


def steps(colors: Mapping[float, str], base: str = "blue") -> dashboard.ThresholdsConfig:
    """Colors from each value upwards; ``base`` below the first."""
    found = [Threshold(None, base), *(Threshold(value, color) for value, color in colors.items())]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(found)
