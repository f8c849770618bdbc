"""Which knobs set the best trials apart, by PED-ANOVA (Watanabe et al., IJCAI 2023, arXiv 2304.10255), of Optuna.

Chosen because Optuna's fANOVA needs scikit-learn. It compares the distribution of a knob among the best trials with
that among all trials, so trials that missed a limit or crashed count as well.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.export.optuna_study import distributions
from sidecar.record.run_snapshot import RunSnapshot, knobs_that_ran
from sidecar.record.trial import AFTER_THE_SEARCH, Role, Trial, TrialStatus
from sidecar.record.trial_states import RAN_STATUSES

# Optuna advises at least five trials among the best; the best quarter is used here.
FEWEST = 20
_BEST_SHARE = 0.25


@dataclass(frozen=True)
class Importance:
    """The share of each knob, the largest first; empty if there is none, and ``note`` says why."""

    shares: dict[str, float]
    note: str


def knob_importance(snapshot: RunSnapshot) -> Importance:
    """Over the trials of the search and the baseline."""
    wanted = [
        t
        for t in snapshot.trials
        if t.plan.role not in (*AFTER_THE_SEARCH, Role.UNGUARDED) and t.status in RAN_STATUSES
    ]
    if len(wanted) < FEWEST:
        return Importance({}, f"{len(wanted)} trials are too few for this: at least {FEWEST} are needed.")
    if sum(t.status is TrialStatus.FEASIBLE for t in wanted) < _BEST_SHARE * FEWEST:
        return Importance({}, "Too few trials met every limit to compare them with the others.")
    return _evaluated(snapshot, wanted)


def _evaluated(snapshot: RunSnapshot, wanted: Sequence[Trial]) -> Importance:
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    names = [knob.name for knob in snapshot.setup.knobs]
    rows = [knobs_that_ran(t, names) for t in wanted]
    spaces = distributions(snapshot.setup.knobs, rows)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize")
    for row, rank in zip(rows, _ranks(wanted), strict=True):
        known = {name: spaces[name] for name in row}
        study.add_trial(optuna.trial.create_trial(value=rank, params=row, distributions=known))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental, and that a knob was rarely set
        evaluator = PedAnovaImportanceEvaluator(target_quantile=_BEST_SHARE)
        found = get_param_importances(study, evaluator=evaluator)
    total = sum(found.values())
    if not total:
        return Importance({}, "No knob sets the best trials apart.")
    shares = {name: share / total for name, share in sorted(found.items(), key=lambda item: -item[1])}
    note = (
        f"How differently each knob is set in the best quarter of {len(wanted)} trials than in all of them (PED-ANOVA,"
        " shares of the sum). It shows correlation, not causation; with few trials it is rough."
    )
    return Importance(shares, note)


def _ranks(trials: Sequence[Trial]) -> list[float]:
    """Lower is better: first those that met every limit, then those that missed one by how far, then the crashes."""
    keys = [_key(t) for t in trials]
    order = {key: float(rank) for rank, key in enumerate(sorted(set(keys)))}
    return [order[key] for key in keys]


def _key(trial: Trial) -> tuple[int, float]:
    result = trial.result
    if result is None or trial.status is TrialStatus.CRASHED:
        return 2, 0.0
    return (0, -(result.value or 0.0)) if trial.status is TrialStatus.FEASIBLE else (1, result.violation)
