"""One engine's traffic in bounded memory at any rate: exact counts over time, and a sample of requests."""

import random
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple, Self

from vllm_sloguard.latency import GapHistogram
from vllm_sloguard.wire import telemetry_pb2 as pb

# Older requests and gaps are dropped.
HORIZON_S = 3600.0
_MAX_SAMPLED = 10_000
_COUNT_SLOT_S = 1.0
_COUNTED_S = 900.0
_GAP_SLOT_S = 10.0
_LARGEST_BUCKET = 1100  # a nanosecond is -1047, a century 1105
# The sidecar's own probe: "a", and one token.
_PROBE_PROMPT_TOKENS, _PROBE_OUTPUT_TOKENS = 2, 1
REJECTED = "rejected"


@dataclass(frozen=True)
class Slot:
    """A count of events from ``at`` on, in monotonic seconds."""

    at: float
    count: int


@dataclass(frozen=True)
class GapSlot:
    """Gaps between tokens (ITL) from ``at`` on, in monotonic seconds."""

    at: float
    gaps: GapHistogram


class SampledRequest(NamedTuple):
    """A finished request reported at ``at``, in monotonic seconds.

    Encoded, because a message that arrived in a batch keeps the memory of the whole batch.
    """

    at: float
    encoded: bytes

    @classmethod
    def of(cls, at: float, request: pb.RequestFinished) -> Self:
        """``request`` as reported at ``at``."""
        return cls(at, request.SerializeToString())

    @property
    def request(self) -> pb.RequestFinished:
        """The request."""
        return pb.RequestFinished.FromString(self.encoded)


@dataclass(frozen=True)
class Traffic:
    """An engine's requests since ``since``, in this process's monotonic seconds.

    ``requests`` is a uniform sample of finished requests, complete while ``sampled_share`` is 1. ``ended`` counts all
    real users' requests over the last minutes. ``gaps`` is empty if the plugin reports none.
    """

    since: float
    requests: tuple[SampledRequest, ...]
    sampled_share: float = 1.0
    ended: tuple[Slot, ...] | None = None
    gaps: tuple[GapSlot, ...] = ()
    admitted: int = 0

    def ended_after(self, at: float) -> int:
        """The number of real users' requests that ended after ``at``."""
        if self.ended is None:
            return sum(sampled.at > at for sampled in self.requests if not is_probe(sampled.request))
        return sum(slot.count for slot in self.ended if slot.at > at)

    def gaps_after(self, at: float) -> GapHistogram:
        """Gaps between tokens after ``at``, to within ten seconds."""
        merged = GapHistogram()
        for slot in self.gaps:
            if slot.at + _GAP_SLOT_S > at:
                merged.merge(slot.gaps.counts)
        return merged


def is_probe(request: pb.RequestFinished) -> bool:
    """Whether this request is the sidecar's own probe."""
    short = request.prompt_tokens <= _PROBE_PROMPT_TOKENS and request.output_tokens <= _PROBE_OUTPUT_TOKENS
    return short and request.finish_reason != REJECTED


class TrafficRecorder:
    """Records requests and gaps as they are reported, from ``since`` on."""

    def __init__(self, since: float, most_sampled: int = _MAX_SAMPLED) -> None:
        self._since = since
        self._most_sampled = most_sampled
        self._sample: deque[SampledRequest] = deque()
        self._share = 1.0
        self._draw = random.Random(0)  # noqa: S311 - sampling, not cryptography
        self._ended: deque[list[float]] = deque()
        self._gaps: deque[GapSlot] = deque()
        self.admitted = 0
        self.ended = 0

    def request(self, request: pb.RequestFinished, now: float) -> None:
        """Records a finished request, reported at ``now``."""
        self.ended += request.finish_reason != REJECTED
        if not is_probe(request):
            if not self._ended or now >= self._ended[-1][0] + _COUNT_SLOT_S:
                self._ended.append([now, 0])
                while self._ended[0][0] < now - _COUNTED_S:
                    self._ended.popleft()
            self._ended[-1][1] += 1
        while self._sample and self._sample[0].at < now - HORIZON_S:
            self._sample.popleft()
        if self._share < 1 and len(self._sample) < self._most_sampled / 4:
            self._share *= 2
        if self._share == 1 or self._draw.random() < self._share:
            self._sample.append(SampledRequest.of(now, request))
        if len(self._sample) > self._most_sampled:
            self._share /= 2
            self._sample = deque(kept for kept in self._sample if self._draw.random() < 0.5)

    def step_gaps(self, stats: pb.StepStats, now: float) -> None:
        """Records the gap counts of ``stats``."""
        if not stats.gap_buckets:
            return
        if not self._gaps or now >= self._gaps[-1].at + _GAP_SLOT_S:
            self._gaps.append(GapSlot(now, GapHistogram()))
            while self._gaps[0].at < now - HORIZON_S:
                self._gaps.popleft()
        counts: dict[int, int] = {}
        for bucket, count in zip(stats.gap_buckets, stats.gap_counts, strict=False):
            bounded = min(max(bucket, -_LARGEST_BUCKET), _LARGEST_BUCKET)
            counts[bounded] = counts.get(bounded, 0) + count
        self._gaps[-1].gaps.merge(counts)

    @property
    def requests(self) -> list[pb.RequestFinished]:
        """The sample, oldest first."""
        return [sampled.request for sampled in self._sample]

    def forget_requests(self) -> None:
        """Frees the sample."""
        self._sample.clear()

    def snapshot(self) -> Traffic:
        """The current traffic."""
        gaps = list(self._gaps)
        if gaps:  # the last slot is still being written
            gaps[-1] = GapSlot(gaps[-1].at, GapHistogram(dict(gaps[-1].gaps.counts)))
        ended = tuple(Slot(at, int(count)) for at, count in self._ended)
        return Traffic(self._since, tuple(self._sample), self._share, ended, tuple(gaps), self.admitted)
