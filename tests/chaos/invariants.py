"""Invariants checked from outside after every fault: the journal's rows, the fake engines' own logs, the files."""

import json
import math
from collections import Counter
from itertools import pairwise

import yaml
from rig import Rig

# A window has three trials, two validation pairs and a restore; a fault adds a few failed starts.
_MAX_STARTS = 28
_MAX_TRIES = 4
# From when a window is due to its record: one cycle of the loop, on a busy machine.
_OPENING_S = 2.0


def wrong(rig: Rig) -> list[str]:
    """The violated invariants of the journal, the files and the serving engine."""
    found = [*_unended(rig), *_served(rig), *_files(rig), *_private(rig), *_retries(rig)]
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


def expected_seqs(rig: Rig) -> int:
    """The max_num_seqs of the journal's current configuration."""
    held = [promoted for _, promoted, undone in _promotions(rig) if not undone]
    return held[-1] if held else rig.settings.incumbent


def _promotions(rig: Rig) -> list[tuple[int | None, int, bool]]:
    """The run, max_num_seqs and whether it was rolled back, of every promotion."""
    rows = rig.rows(
        "SELECT p.run, p.args, r.promotion FROM promotions p LEFT JOIN rollbacks r ON r.promotion = p.id ORDER BY p.id"
    )
    return [(run, json.loads(args)["max_num_seqs"], undone is not None) for run, args, undone in rows]


def _served(rig: Rig) -> list[str]:
    """Only the incumbent or the last promotion may serve, and every promotion needs a feasible validation."""
    found: list[str] = []
    expected = expected_seqs(rig)
    for run, promoted, _ in _promotions(rig):
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


def _private(rig: Rig) -> list[str]:
    """Other users must not be able to read the state folder, nor any file in it."""
    paths = [rig.state, *(path for path in rig.state.rglob("*") if path != rig.output)]
    return [
        f"{path.name} is open to others" for path in paths if path.lstat().st_mode & 0o077 and not path.is_symlink()
    ]


def _retries(rig: Rig) -> list[str]:
    starts = rig.starts()
    found = [f"{len(starts)} starts of engines"] if len(starts) > _MAX_STARTS else []
    plans = [(run, json.loads(plan)) for run, plan in rig.rows("SELECT run, plan FROM trials")]
    tries = Counter((run, plan["role"], plan["args"]["max_num_seqs"]) for run, plan in plans)
    found += [f"{role} of max_num_seqs={n} was tried {c} times" for (_, role, n), c in tries.items() if c > _MAX_TRIES]
    return found


def killed_bystanders(rig: Rig) -> list[str]:
    """Processes that are not the sidecar's, and ended during the run."""
    return [
        f"process {other.pid} ({other.args!r:.40}) was killed" for other in rig.bystanders if other.poll() is not None
    ]


def wrong_windows(rig: Rig) -> list[str]:
    """Windows of the schedule that opened late or twice, or neither opened nor have a record."""
    opened = [
        (at, due)
        for at, due in rig.rows("SELECT at, json_extract(content, '$.due') FROM events WHERE kind = 'window_opened'")
        if due is not None
    ]
    recorded = rig.rows(
        "SELECT json_extract(content, '$.first_due'), json_extract(content, '$.last_due') FROM events"
        " WHERE kind = 'window_ended' AND json_extract(content, '$.first_due') IS NOT NULL"
    )
    lateness_s = rig.settings.latest_start_s
    found = [f"a window opened {at - due:.1f} s late" for at, due in opened if at - due > lateness_s + _OPENING_S]
    found += [
        f"the window due at {due:.0f} opened {n} times" for due, n in Counter(d for _, d in opened).items() if n > 1
    ]
    for due in _due(rig):
        if not any(due == one for _, one in opened) and not any(first <= due <= last for first, last in recorded):
            found.append(f"the window due at {due:.0f} is lost")
    return found


def _due(rig: Rig) -> list[float]:
    """When windows were due, every minute; leaves out those that may still open."""
    if not rig.settings.cron:
        return []
    margin_s = rig.settings.latest_start_s + _OPENING_S
    found: list[float] = []
    for began, ended in rig.stretches:
        first = math.floor((began + _OPENING_S) / 60) + 1
        found += [60.0 * minute for minute in range(first, math.ceil((ended - margin_s) / 60))]
    return [due for due in found if due < rig.wall() - margin_s]  # after a jump back, the rest comes again


def own_start_s(rig: Rig) -> float:
    """The longest successful start of the serving engine: nothing is faster than that."""
    rows = rig.rows("SELECT json_extract(content, '$.seconds') FROM events WHERE kind = 'start'")
    return max((float(seconds) for (seconds,) in rows), default=0.0)
