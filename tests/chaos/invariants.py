"""Invariants checked from outside after every fault: the journal's rows, the fake engines' own logs, the files."""

import json
from collections import Counter
from itertools import pairwise

import yaml
from rig import Rig

# A window has three trials, two validation pairs and a restore; a fault adds a few failed starts.
_MOST_STARTS = 28
_MOST_TRIES = 4


def wrong(rig: Rig, outage_s: float) -> list[str]:
    """The violated invariants, except lost trials and double controllers."""
    found = [*_unended(rig), *_served(rig), *_files(rig), *_retries(rig)]
    if outage_s > rig.bounds.outage_s:
        found.append(f"{outage_s:.1f} s of outage")
    if "Traceback" in (said := rig.said()):
        found.append(f"a traceback: {said[said.index('Traceback') :].splitlines()[-1]}")
    return found


def double_controllers(rig: Rig) -> list[str]:
    """Two engines on one GPU, or two sidecars that alternate in starting engines."""
    starts = rig.starts()
    found = ["an engine was started while another one held the GPU" for start in starts if not start["free"]]
    turns = [start["sidecar"] for start in starts]
    changes = [after for before, after in pairwise(turns) if before != after]
    found += [f"sidecar {pid} started engines again after another one had" for pid in changes if changes.count(pid) > 1]
    return found


def worst_restore_s(rig: Rig) -> float:
    """The longest successful start for serving."""
    worst, began = 0.0, None
    for at, state in rig.rows("SELECT at, state FROM states ORDER BY id"):
        if state in ("starting", "restoring", "promoting"):
            began = at if began is None else began
        else:
            worst = max(worst, at - began) if began is not None and state == "serving" else worst
            began = None
    return worst


def _unended(rig: Rig) -> list[str]:
    running = rig.rows("SELECT run, number FROM trials WHERE ended_at IS NULL")
    runs = rig.rows("SELECT id FROM runs WHERE ended_at IS NULL")
    engines = rig.rows("SELECT engine_id FROM engines")
    found = [f"trial {run}/{number} never ended" for run, number in running]
    found += [f"run {run[0]} never ended" for run in runs]
    return [*found, *(f"engine {engine[0]} is in the journal but gone" for engine in engines)]


def _served(rig: Rig) -> list[str]:
    """Only the incumbent or the last promotion may serve, and every promotion needs a feasible validation."""
    found: list[str] = []
    expected = rig.settings.incumbent
    for run, args, undone in rig.rows(
        "SELECT p.run, p.args, r.promotion FROM promotions p LEFT JOIN rollbacks r ON r.promotion = p.id ORDER BY p.id"
    ):
        promoted = json.loads(args)["max_num_seqs"]
        expected = promoted if undone is None else expected
        if run is not None and not _validated(rig, run, promoted):
            found.append(f"run {run} promoted max_num_seqs={promoted} without validating it")
    if rig.served not in (expected, 0):
        found.append(f"max_num_seqs={rig.served} serves instead of {expected}")
    if rig.served == 0:
        found.append("no engine serves at the end")
    return found


def _validated(rig: Rig, run: int, seqs: int) -> bool:
    rows = rig.rows("SELECT plan, result FROM trials WHERE run = ? AND result IS NOT NULL", run)
    for plan, result in ((json.loads(plan), json.loads(result)) for plan, result in rows):
        same = plan["role"] == "validation" and plan["args"]["max_num_seqs"] == seqs
        if same and result["crash"] is None and result["violation"] == 0:
            return True
    return False


def _files(rig: Rig) -> list[str]:
    """promoted.yaml must be intact and match the serving engine."""
    path = rig.state / "promoted.yaml"
    if not path.is_file():
        return []
    try:
        content = yaml.safe_load(path.read_text())
        seqs = content["max-num-seqs"]
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        return [f"promoted.yaml is damaged: {error}"]
    return [] if seqs == rig.served else [f"promoted.yaml says max-num-seqs={seqs}, but {rig.served} serves"]


def _retries(rig: Rig) -> list[str]:
    starts = rig.starts()
    found = [f"{len(starts)} starts of engines"] if len(starts) > _MOST_STARTS else []
    plans = [json.loads(plan) for (plan,) in rig.rows("SELECT plan FROM trials")]
    tries = Counter((plan["role"], plan["args"]["max_num_seqs"]) for plan in plans)
    found += [f"{role} of max_num_seqs={n} was tried {c} times" for (role, n), c in tries.items() if c > _MOST_TRIES]
    return found
