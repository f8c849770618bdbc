"""Reads from the journal how long the parts of a window take."""

from sidecar.config.schema import Config
from sidecar.preflight.window_forecast import Durations, alike, drains, durations
from sidecar.record.events import Operations
from sidecar.record.journal import Journal


def recorded_durations(config: Config, journal: Journal | None, operations: Operations | None) -> Durations:
    """How long the parts of a window take: as the journal has them, or else as assumed."""
    if journal is None or operations is None:
        return durations(config, [], None, [])
    runs = alike(journal.run_configs(), config)
    trials = [trial for trial in journal.trials() if trial.run in runs]
    states = [(state.at, state.state) for state in journal.states()]
    return durations(config, trials, operations.longest_start_s(), drains(states))
