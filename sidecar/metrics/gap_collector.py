"""A Prometheus histogram of the gaps between tokens, from the buckets that the plugins report."""

import threading
from collections.abc import Iterable, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from vllm_sloguard.latency import GapHistogram, bucket_value


class GapCollector(Collector):
    """One histogram with the label "traffic", computed at each scrape: gaps are too many to observe one by one.

    A reported bucket counts with its middle, which is within 1% of each of its values.
    """

    def __init__(self, name: str, about: str, traffics: Sequence[str], bounds_s: Sequence[float]) -> None:
        self._name = name
        self._about = about
        self._bounds_s = tuple(map(float, bounds_s))
        self._lock = threading.Lock()
        self._gaps = {traffic: GapHistogram() for traffic in traffics}

    def add(self, traffic: str, buckets: Sequence[int], counts: Sequence[int]) -> None:
        """Adds the gaps of one report; both sequences have the same length."""
        with self._lock:
            self._gaps[traffic].merge(dict(zip(buckets, counts, strict=False)))

    def reset(self, traffic: str) -> None:
        """Counts from 0 again."""
        with self._lock:
            self._gaps[traffic] = GapHistogram()

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Called by the registry."""
        family = HistogramMetricFamily(self._name, self._about, labels=["traffic"])
        with self._lock:
            copies = {traffic: sorted(gaps.counts.items()) for traffic, gaps in self._gaps.items()}
        for traffic, counts in copies.items():
            seconds = [(bucket_value(bucket), count) for bucket, count in counts]
            bounds = [(repr(bound), sum(n for at, n in seconds if at <= bound)) for bound in self._bounds_s]
            bounds.append(("+Inf", sum(n for _, n in seconds)))
            family.add_metric([traffic], bounds, sum(at * n for at, n in seconds))
        yield family
