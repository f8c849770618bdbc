"""A small discrete-event model of an engine with continuous batching, for landscapes that crash.

Each step runs one token of every decoding request and, up to ``max_num_batched_tokens``, prompt tokens; requests wait
for a slot (``max_num_seqs``) and for KV memory; when KV memory runs out, the youngest is preempted and recomputed.
Steps between two events are taken at once, so a trial takes milliseconds.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from functools import cache

import numpy as np

GRAPH_TOKENS = 512  # larger steps run without a CUDA graph (vLLM's largest capture size)


@dataclass(frozen=True)
class Speed:
    """The duration of a step: a base, plus increments per sequence, prompt token and token of context.

    A prompt token also attends to those before it: at ``attention_tokens`` of them it costs twice as much.
    """

    graph_ms: float
    eager_ms: float
    sequence_us: float
    token_us: float
    context_us: float
    frontend_ms: float
    attention_tokens: float = 32_768


@dataclass(frozen=True)
class Load:
    """Open-loop requests. Lengths are lognormal, capped at ``longest`` in total.

    The requests are the same in every trial, as in a tuning run; each arrives up to ``jitter_ms`` late.
    """

    rate_rps: float
    requests: int
    prompt: int
    output: int
    prompt_sigma: float = 0.1
    output_sigma: float = 0.1
    longest: int = 10**6
    shared_prefix: float = 0.0  # share of a prompt that other requests have too
    prefix_tokens: int = 1  # total of all shared prefixes: a smaller KV cache keeps fewer
    jitter_ms: float = 5.0
    seed: int = 0


@dataclass(frozen=True)
class Settings:
    """A configuration, as far as the model uses it."""

    seqs: int
    batch: int
    kv_tokens: float
    max_len: int
    eager: bool = False
    chunked: bool = True
    prefix_caching: bool = False
    long_prefill: int = 0
    stream_interval: int = 1
    block: int = 16
    slower: float = 1.0  # a factor on every step


@dataclass(frozen=True)
class Answer:
    """One request as its client sees it, in seconds; ``ttft_s`` is None if it was rejected or never answered."""

    start_s: float
    ttft_s: float | None
    e2e_s: float | None
    itls_s: np.ndarray


@dataclass(frozen=True)
class Served:
    """The load's results over the accepted requests; times in milliseconds."""

    ttft_ms: np.ndarray
    e2e_ms: np.ndarray
    itl_ms: tuple[np.ndarray, np.ndarray]  # durations, and how often each occurred
    rejected: int
    duration_s: float
    preemptions: int
    requests: tuple[Answer, ...] = ()  # all of them, rejected ones included, by arrival

    def itl(self, q: float) -> float:
        """The weighted quantile of the time between tokens."""
        durations, weights = self.itl_ms
        if not len(durations):
            return 0.0
        order = np.argsort(durations)
        total = np.cumsum(weights[order])
        return float(durations[order][np.searchsorted(total, q * total[-1])])


@dataclass
class _Request:
    arrival: float
    prompt: float  # tokens still to be computed
    held: float  # tokens in the KV cache
    left: int  # output tokens still to be generated
    finish: int = 0  # the step after which it ends
    first: float = -1.0
    end: float = -1.0
    began: int = 0  # the step before its next token
    token_steps: list[tuple[int, int]] = field(default_factory=list["tuple[int, int]"])  # from, to: a token after each


@dataclass
class _Engine:
    """The state between two steps."""

    settings: Settings
    speed: Speed
    now: float = 0.0
    step: int = 0
    held: float = 0.0  # KV tokens in use
    waiting: deque[_Request] = field(default_factory=deque["_Request"])
    prefilling: list[_Request] = field(default_factory=list["_Request"])
    decoding: list[_Request] = field(default_factory=list["_Request"])  # oldest first
    finishes: list[tuple[int, int, _Request]] = field(default_factory=list["tuple[int, int, _Request]"])
    clocks: list[float] = field(default_factory=list[float])  # of each block of equal steps: when it began
    blocks: list[int] = field(default_factory=list[int])  # how many steps it has
    block_ms: list[float] = field(default_factory=list[float])  # and how long each of them takes
    durations: list[float] = field(default_factory=list[float])
    weights: list[int] = field(default_factory=list[int])
    preemptions: int = 0
    admitted: int = 0

    def duration(self, tokens: float, attended: float, context: float) -> float:
        """One step over ``tokens`` of prompts, with ``attended`` in total, together with all decoding requests."""
        speed, decodes = self.speed, len(self.decoding)
        graph = not self.settings.eager and tokens + decodes <= GRAPH_TOKENS
        prompts = speed.token_us * (tokens + attended / speed.attention_tokens)
        us = speed.sequence_us * decodes + prompts + speed.context_us * context / 1000
        return ((speed.graph_ms if graph else speed.eager_ms) + us / 1000) * self.settings.slower

    def record(self, duration: float, steps: int) -> None:
        if self.decoding:
            self.durations.append(duration)
            self.weights.append(steps * len(self.decoding))

    def advance(self, steps: int, duration: float) -> None:
        """``steps`` steps of ``duration`` each. Every decoding request gains as many tokens; some finish."""
        self.record(duration, steps)
        self.clocks.append(self.now)
        self.blocks.append(steps)
        self.block_ms.append(duration)
        self.now += steps * duration
        self.step += steps
        self.held += steps * len(self.decoding)
        while self.finishes and self.finishes[0][0] <= self.step:
            request = heapq.heappop(self.finishes)[2]
            if request.finish > self.step or request.end >= 0 or request.finish == 0:
                continue  # it was preempted meanwhile
            request.end = self.now
            request.token_steps.append((request.began, self.step))
            self.held -= request.held + request.left
            self.decoding.remove(request)

    def preempt(self) -> None:
        """Frees the youngest request's memory; it is recomputed, including its output so far."""
        request = self.decoding.pop()
        done = request.left - (request.finish - self.step)
        self.held -= request.held + done
        request.token_steps.append((request.began, self.step))
        request.prompt, request.left = request.held + done, request.finish - self.step
        request.held, request.finish = 0.0, 0
        self.waiting.appendleft(request)
        self.preemptions += 1

    def prompts(self) -> tuple[float, float, list[_Request]]:
        """Fills the step with prompt tokens: their number, attended tokens, and whose prompts are finished."""
        settings = self.settings
        budget = settings.batch - len(self.decoding)
        tokens, attended, ended = 0.0, 0.0, list["_Request"]()
        for request in self.prefilling:
            took = self._take(request, budget - tokens)
            attended += took * (request.held - took)
            tokens += took
            if request.prompt <= 0:
                ended.append(request)
        while self.waiting and len(self.decoding) + len(self.prefilling) < settings.seqs and budget > tokens:
            request = self.waiting[0]
            if self.held + request.prompt + settings.block > settings.kv_tokens:
                break
            if not settings.chunked and request.prompt > budget - tokens and (tokens or self.decoding):
                break
            self.waiting.popleft()
            self.prefilling.append(request)
            tokens += self._take(request, budget - tokens)
            if request.prompt <= 0:
                ended.append(request)
        return tokens, attended, ended

    def _take(self, request: _Request, room: float) -> float:
        took = request.prompt if not self.settings.chunked else min(request.prompt, room)
        if self.settings.long_prefill and self.settings.chunked:
            took = min(took, self.settings.long_prefill)
        request.prompt -= took
        request.held += took
        self.held += took
        return took

    def begin_decoding(self, request: _Request) -> None:
        self.prefilling.remove(request)
        request.began = self.step
        if request.first < 0:
            request.first = self.now
            request.left -= 1
            request.held += 1
            self.held += 1
        if request.left <= 0:
            request.end = self.now
            self.held -= request.held
            return
        request.finish = self.step + request.left
        self.admitted += 1
        heapq.heappush(self.finishes, (request.finish, self.admitted, request))
        self.decoding.append(request)


def serve(load: Load, settings: Settings, speed: Speed, rng: np.random.Generator) -> Served:
    """Runs ``load``. Requests longer than ``max_len`` are rejected, as vLLM does."""
    requests, rejected = _drawn(load, settings, rng)
    engine = _Engine(settings, speed)
    coming = deque(requests)
    while coming or engine.waiting or engine.prefilling or engine.decoding:
        while coming and coming[0].arrival <= engine.now:
            engine.waiting.append(coming.popleft())
        while len(engine.decoding) > 1 and engine.held + len(engine.decoding) > settings.kv_tokens:
            engine.preempt()
        tokens, attended, ended = engine.prompts() if engine.waiting or engine.prefilling else (0.0, 0.0, [])
        if tokens:
            engine.advance(1, engine.duration(tokens, attended, engine.held))
            for request in ended:
                engine.begin_decoding(request)
        elif engine.decoding:
            _decode(engine, coming)
        elif coming:
            engine.now = max(engine.now, coming[0].arrival)
        else:
            break  # the waiting requests can never fit
    return _served(engine, requests, rejected)


def _decode(engine: _Engine, coming: deque[_Request]) -> None:
    """The number of steps until something other than decoding happens."""
    decodes = len(engine.decoding)
    while engine.finishes[0][2].finish != engine.finishes[0][0]:
        heapq.heappop(engine.finishes)
    steps = max(1, engine.finishes[0][0] - engine.step)
    duration = engine.duration(0, 0, engine.held + decodes * steps / 2)
    if coming and not engine.waiting and decodes < engine.settings.seqs:
        steps = min(steps, max(1, int(np.ceil((coming[0].arrival - engine.now) / duration))))
    room = int((engine.settings.kv_tokens - engine.held) // decodes)
    engine.advance(max(1, min(steps, room)), duration)


@cache
def _workload(load: Load) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrival times (Poisson) in ms, and lengths of prompts and outputs in tokens."""
    rng = np.random.default_rng(load.seed)
    arrivals = np.cumsum(rng.exponential(1000 / load.rate_rps, load.requests))
    prompts = np.exp(rng.normal(np.log(load.prompt), load.prompt_sigma, load.requests))
    outputs = np.exp(rng.normal(np.log(load.output), load.output_sigma, load.requests))
    prompts = np.clip(prompts, 8, load.longest - 16).round()
    return arrivals, prompts, np.clip(outputs, 2, load.longest - prompts).round()


def _drawn(load: Load, settings: Settings, rng: np.random.Generator) -> tuple[list[_Request], list[float]]:
    arrivals, prompts, outputs = _workload(load)
    arrivals = np.sort(arrivals + rng.uniform(0, load.jitter_ms, load.requests))
    accepted = prompts + outputs <= settings.max_len
    kept = min(1.0, settings.kv_tokens / load.prefix_tokens) if settings.prefix_caching else 0.0
    cached = load.shared_prefix * kept
    requests = [
        _Request(float(a), float(p) * (1 - cached), float(p) * cached * 0.1, int(o))
        for a, p, o in zip(arrivals[accepted], prompts[accepted], outputs[accepted], strict=True)
    ]
    return requests, [float(a) for a in arrivals[~accepted]]


def _served(engine: _Engine, requests: list[_Request], rejected: list[float]) -> Served:
    done = [request for request in requests if request.end >= 0]
    frontend = engine.speed.frontend_ms
    ttft = np.array([r.first - r.arrival for r in done]) + frontend
    e2e = np.array([r.end - r.arrival for r in done]) + frontend
    durations, weights = np.array(engine.durations), np.array(engine.weights)
    interval = engine.settings.stream_interval
    if interval > 1 and len(durations):
        # Tokens come in chunks: one gap holds that many steps.
        durations = durations + (interval - 1) * float(np.average(durations, weights=weights))
    ends = _step_ends(engine)
    answers = [_answer(r, ends, frontend, interval) for r in requests]
    answers += [Answer(arrival / 1000, None, None, np.empty(0)) for arrival in rejected]
    return Served(
        ttft,
        e2e,
        (durations, weights),
        len(rejected) + len(requests) - len(done),
        engine.now / 1000,
        engine.preemptions,
        tuple(sorted(answers, key=lambda answer: answer.start_s)),
    )


def _step_ends(engine: _Engine) -> np.ndarray:
    """The end of each step in ms. Shape (steps,)."""
    blocks = np.array(engine.blocks, dtype=int)
    if not len(blocks):
        return np.empty(0)
    first = np.repeat(np.cumsum(blocks) - blocks, blocks)
    within = np.arange(1, int(blocks.sum()) + 1) - first
    return np.repeat(engine.clocks, blocks) + within * np.repeat(engine.block_ms, blocks)


def _answer(request: _Request, ends: np.ndarray, frontend: float, interval: int) -> Answer:
    """The client's view; tokens come ``interval`` at a time, the first one alone."""
    if request.end < 0:
        return Answer(request.arrival / 1000, None, None, np.empty(0))
    tokens = np.concatenate([[request.first], *(ends[low:high] for low, high in request.token_steps)])
    pieces = tokens[::interval] if interval > 1 else tokens
    if interval > 1 and (len(tokens) - 1) % interval:
        pieces = np.append(pieces, tokens[-1])
    return Answer(
        request.arrival / 1000,
        (request.first - request.arrival + frontend) / 1000,
        (request.end - request.arrival + frontend) / 1000,
        np.diff(pieces) / 1000,
    )
