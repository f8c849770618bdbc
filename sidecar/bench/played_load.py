"""Plays a landscape's requests over time, as the load client would report them.

A file's ``serve(config, rng)`` gives the result of each request of a complete load. The stop rules see it as in
production: what has finished and what is in flight at each poll.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from sidecar.measure.requests import (
    End,
    Ending,
    InFlight,
    LoadProgress,
    LoadResult,
    RequestResult,
    StopRule,
    to_the_end,
)

# The client reports four times a second; long loads are polled less often to keep the bench fast.
_TICK_S, _MAX_LOOKS = 0.25, 40


@dataclass(frozen=True)
class ServedLoad:
    """The result of ``serve``: a crash, or the requests by start; ``planned`` of them make a complete load."""

    crash_kind: str
    crash_phase: str
    start_s: float
    planned: int
    requests: tuple[RequestResult, ...]

    @property
    def crashed(self) -> bool:
        """Whether the engine crashed."""
        return bool(self.crash_kind)

    @property
    def rate(self) -> float:
        """Requests per second, as in a workload's configuration."""
        starts = [r.start_s or 0.0 for r in self.requests]
        span_s = max(starts, default=0.0) - min(starts, default=0.0)
        return (len(starts) - 1) / span_s if span_s > 0 else max(float(len(starts)), 1.0)

    @property
    def most_gaps(self) -> int:
        """Of any request."""
        return max((len(r.itls_s) for r in self.requests), default=0)

    @property
    def whole_s(self) -> float:
        """From the first request's start to the last one's end."""
        return _last_end_s(self.requests)


def served_from(name: str, answer: Any) -> ServedLoad:
    """Parses the result of ``serve``. Raises ValueError or TypeError with the problem."""
    if not isinstance(answer, Mapping):
        raise TypeError(f"{name}: serve() must return a mapping, got {answer!r}")
    stated = cast("Mapping[str, Any]", answer)
    crash: object = stated.get("crash")
    kind, phase = "", ""
    if crash is not None and crash is not False:
        named = cast("Mapping[str, Any]", crash) if isinstance(crash, Mapping) else {"kind": crash}
        kind, phase = str(named.get("kind") or "unknown"), str(named.get("phase") or "")
    listed = stated.get("requests")
    rows: list[Any] = [] if listed is None else list(listed)
    requests = sorted((_request(name, row) for row in rows), key=lambda r: r.start_s or 0.0)
    planned = _number(stated.get("planned"))
    if not kind and not requests:
        raise ValueError(f"{name}: serve() must return at least one request, or a crash")
    return ServedLoad(
        kind,
        phase,
        _number(stated.get("start_s")) or 0.0,
        max(len(requests), 0 if planned is None else int(planned)),
        tuple(requests),
    )


def _request(name: str, row: Any) -> RequestResult:
    if not isinstance(row, Mapping):
        raise TypeError(f"{name}: each of serve()'s requests must be a mapping, got {row!r}")
    stated = cast("Mapping[str, Any]", row)
    error = stated.get("error")
    ttft_s, e2e_s = _number(stated.get("ttft_s")), _number(stated.get("e2e_s"))
    text = str(error) if error else "" if e2e_s is not None else "no answer"
    listed = stated.get("itls_s")
    gaps: Any = () if listed is None or text else listed
    itls = tuple(cast("list[float]", np.asarray(gaps, dtype=float).tolist()))
    start_s = _number(stated.get("start_s")) or 0.0
    if text:
        return RequestResult(None, None, (), text, start_s)
    return RequestResult(e2e_s if ttft_s is None else ttft_s, e2e_s, itls, "", start_s)


def _number(value: Any) -> float | None:
    plain: Any = cast("Any", value.item()) if isinstance(value, np.generic) else value
    if isinstance(plain, bool) or not isinstance(plain, int | float) or not math.isfinite(plain):
        return None
    return float(plain)


def played(served: ServedLoad, rule: StopRule) -> LoadResult:
    """The load under ``rule``: complete, or up to where the rule ended it."""
    requests = served.requests
    first_s = requests[0].start_s or 0.0
    starts = [(r.start_s or 0.0) - first_s for r in requests]
    by_end = sorted(zip([_end_s(r) - first_s for r in requests], range(len(requests)), strict=True))
    whole_s = max(by_end[-1][0], starts[-1])
    if rule is to_the_end:
        return LoadResult(requests, whole_s, planned=served.planned)
    step_s = max(_TICK_S, whole_s / _MAX_LOOKS)
    ends = [end for end, _ in by_end]
    for look in range(1, math.ceil(whole_s / step_s)):
        now_s = look * step_s
        done = {index for _, index in by_end[: bisect_right(ends, now_s)]}
        sent = bisect_right(starts, now_s)
        flying = tuple(_in_flight(requests[n], now_s + first_s) for n in range(sent) if n not in done)
        finished = tuple(requests[n] for n in sorted(done))
        ending = rule(LoadProgress(now_s + first_s, served.planned, finished, flying))
        if ending is not None:
            return _ended(served, ending, now_s, sent, finished)
    return LoadResult(requests, whole_s, planned=served.planned)


def _ended(
    served: ServedLoad, ending: Ending, now_s: float, sent: int, finished: tuple[RequestResult, ...]
) -> LoadResult:
    """The load as ended ``now_s`` after its first request."""
    whole = LoadResult(finished, now_s, planned=served.planned, cancelled=sent - len(finished), ending=ending)
    if ending.how is End.STOP:
        return whole
    kept = served.requests[:sent]
    return replace(whole, requests=kept, duration_s=max(now_s, _last_end_s(kept)), cancelled=0)


def _last_end_s(requests: Sequence[RequestResult]) -> float:
    """Seconds after the first request's start."""
    if not requests:
        return 0.0
    return max(_end_s(r) for r in requests) - min(r.start_s or 0.0 for r in requests)


def _in_flight(request: RequestResult, now_s: float) -> InFlight:
    start_s = request.start_s or 0.0
    begun = request.ttft_s is not None and start_s + request.ttft_s <= now_s
    return InFlight(start_s, request.ttft_s if begun else None)


def _end_s(request: RequestResult) -> float:
    """A failed request fails at once: the landscape does not state when."""
    return (request.start_s or 0.0) + (request.e2e_s or 0.0)
