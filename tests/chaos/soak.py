#!/usr/bin/env python3
"""A soak: six hours of a service in 20 minutes, with windows, users' traffic and faults throughout.

    python tests/chaos/soak.py [--minutes 20]

A simulated hour is a sixth of the run. The serving engine reports 500 requests a second, a window opens every third
minute, and every 15 s there is a fault. Prints memory, descriptors, threads and disk by hour; the exit code is 1 unless
they are flat after the first.
"""

import argparse
import random
import signal
import sqlite3
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from faults import answers_cut, core_killed
from outside_faults import SLOW
from rig import Rig, Settings, new_folder
from zygote import Zygote

RATE = 500.0
_HOURS = 6
_SAMPLE_S = 2.0
_FAULT_S = 15.0
_SLOW_CLIENTS = 200


@dataclass(frozen=True)
class Sample:
    """The sidecar at one moment."""

    memory_mib: float
    descriptors: int
    threads: int
    disk_mib: float


@dataclass(frozen=True)
class Bound:
    """How much more the last hour's median may be than the second's."""

    name: str
    value: Callable[[Sample], float]
    most: float


BOUNDS = (
    # A sample of up to 10,000 requests of each of the last three engines: 2 MiB each.
    Bound("memory, MiB", lambda sample: sample.memory_mib, 10.0),
    Bound("descriptors", lambda sample: sample.descriptors, 3.0),
    Bound("threads", lambda sample: sample.threads, 2.0),
    # The record itself: about 100 KiB a window.
    Bound("disk, MiB", lambda sample: sample.disk_mib, 4.0),
)


def engine_dies(rig: Rig, rng: random.Random) -> None:
    if (engine := rig.engine()) is not None:
        with suppress(psutil.Error):
            engine.kill()


def journal_is_locked(rig: Rig, rng: random.Random) -> None:
    with closing(sqlite3.connect(rig.state / "journal.sqlite", isolation_level=None, timeout=20)) as other:
        other.execute("BEGIN EXCLUSIVE")
        time.sleep(rng.uniform(0.5, 3))
        other.execute("ROLLBACK")


def log_is_deleted(rig: Rig, rng: random.Random) -> None:
    for name in ("journal.sqlite-wal", "journal.sqlite-shm"):
        (rig.state / name).unlink(missing_ok=True)


def clients_are_slow(rig: Rig, rng: random.Random) -> None:
    clients = rig.bystander(
        sys.executable, "-c", SLOW, str(rig.metrics_port), str(_SLOW_CLIENTS), str(rig.folder / "connected")
    )
    time.sleep(rng.uniform(4, 8))
    rig.bystanders.remove(clients)
    clients.kill()
    clients.wait()


def orders_are_given(rig: Rig, rng: random.Random) -> None:
    for command in ("pause", "resume", rng.choice(("abort", "retune"))):
        rig.command(command, "-c", str(rig.config_file), output=rig.folder / "actions.txt").wait(60)


def scrapes(rig: Rig, rng: random.Random) -> None:
    for _ in range(20):
        with suppress(OSError):
            _metrics(rig)


def core_dies(rig: Rig, rng: random.Random) -> None:
    core_killed(rig, rng)


def answers_are_cut(rig: Rig, rng: random.Random) -> None:
    answers_cut(rig, rng)


FAULTS = (
    engine_dies,
    core_dies,
    journal_is_locked,
    log_is_deleted,
    clients_are_slow,
    orders_are_given,
    scrapes,
    answers_are_cut,
)


def soak(rig: Rig, minutes: float, seed: int) -> list[Sample]:
    """Runs it; returns the samples, evenly spaced."""
    rng, samples = random.Random(seed), list[Sample]()
    began = time.monotonic()
    next_fault = began + _FAULT_S
    while (now := time.monotonic()) < began + minutes * 60:
        assert rig.sidecar is not None
        if rig.sidecar.poll() is not None:
            raise RuntimeError(f"the sidecar has ended: {rig.said().splitlines()[-1:]}")
        with suppress(psutil.Error, FileNotFoundError):
            samples.append(_sample(psutil.Process(rig.sidecar.pid), rig.state))
        if now >= next_fault:
            rng.choice(FAULTS)(rig, rng)
            next_fault = time.monotonic() + _FAULT_S
        time.sleep(_SAMPLE_S)
    return samples


def _sample(sidecar: psutil.Process, state: Path) -> Sample:
    disk = sum(path.stat().st_blocks * 512 for path in state.rglob("*") if path.is_file())
    memory = sidecar.memory_info().rss
    return Sample(memory / 2**20, sidecar.num_fds(), sidecar.num_threads(), disk / 2**20)


def report(samples: Sequence[Sample]) -> tuple[str, bool]:
    """The medians of each hour, and whether they are flat after the first."""
    size = len(samples) // _HOURS
    hours = [samples[at * size : (at + 1) * size] for at in range(_HOURS)]
    lines, flat = [f"{'':12} {'  '.join(f'hour {n + 1:>2}' for n in range(_HOURS))}  most  bound"], True
    for bound in BOUNDS:
        medians = [sorted(map(bound.value, hour))[len(hour) // 2] for hour in hours]
        most = max(map(bound.value, samples))
        held = medians[-1] - medians[1] <= bound.most
        flat = flat and held
        figures = "  ".join(f"{median:7.1f}" for median in medians)
        lines.append(f"{bound.name:12} {figures}  {most:6.1f}  +{bound.most:g}{'' if held else '  NOT FLAT'}")
    return "\n".join(lines), flat


def _told(rig: Rig) -> str:
    windows = rig.rows(
        "SELECT json_extract(content, '$.outcome'), count(*) FROM events WHERE kind = 'window_ended' GROUP BY 1"
    )
    [[crashes]] = rig.rows("SELECT count(*) FROM events WHERE kind = 'crash'")
    [[trials]] = rig.rows("SELECT count(*) FROM trials")
    ended = ", ".join(f"{count} {outcome}" for outcome, count in windows)
    requests = sum(float(line.split()[-1]) for line in _metrics(rig) if line.startswith("sloguard_requests_total{"))
    return (
        f"windows: {ended}; {trials} trials; {crashes} crashes of the serving engine; {len(rig.starts())} starts;"
        f" {requests:,.0f} requests reported"
    )


def _metrics(rig: Rig) -> list[str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{rig.metrics_port}/metrics", timeout=20) as page:
        return page.read().decode().splitlines()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    settings = Settings(cron="0 */3 * * * *", duration_s=60.0, traffic=RATE, longest_life_s=3600.0)
    zygote = Zygote()
    rig = Rig(zygote, settings, new_folder())
    flat = False
    try:
        rig.start()
        if not rig.await_serving(90):
            print(f"it did not come up: {rig.said()}")
            return 1
        samples = soak(rig, args.minutes, args.seed)
        text, flat = report(samples)
        print(f"{text}\n{_told(rig)} in {args.minutes:g} minutes")
        assert rig.sidecar is not None
        rig.sidecar.signal(signal.SIGINT)
        print(f"exit code {rig.sidecar.wait(90)} after Ctrl-C, {len(rig.processes())} processes left")
    finally:
        rig.close(keep=not flat)
        zygote.close()
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
