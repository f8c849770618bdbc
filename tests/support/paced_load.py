#!/usr/bin/env python3
"""Sends a load as the load client does, without vLLM: paced_load.py URL RATE COUNT TOKENS prints the load's report."""

import asyncio
import sys
from dataclasses import dataclass, field
from typing import Any

import uvloop

from vllm_sloguard.starts.completion_client import CompletionClient
from vllm_sloguard.starts.load_generator import Load
from vllm_sloguard.starts.load_protocol import message_line


@dataclass
class Record:
    """The part of vLLM's RequestFuncOutput that is filled."""

    success: bool = False
    latency: float = 0.0
    output_tokens: int = 0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list[float])
    prompt_len: int = 0
    error: str = ""
    start_time: float = 0.0


@dataclass
class Request:
    """The part of vLLM's RequestFuncInput that is read."""

    api_url: str
    prompt: str = "a prompt"
    prompt_len: int = 3
    output_len: int = 4
    model: str = "model"
    model_name: str | None = None
    logprobs: int | None = None
    extra_headers: dict[str, str] | None = None
    extra_body: dict[str, Any] | None = None
    ignore_eos: bool = True
    request_id: str | None = None


async def main(url: str, rate: float, count: int, tokens: int) -> None:
    """Sends the load as vLLM's benchmark does: a task for each request."""
    load, client = Load(timeout_s=60.0, rate=rate, least_warm_ups=0), CompletionClient(Record)
    requests = [Request(f"{url}/v1/completions", output_len=tokens) for _ in range(count)]
    tasks: list[asyncio.Task[Any]] = []
    async for request, _ in load.paced(requests):
        tasks.append(asyncio.create_task(load.send(client, request, None)))
    client.close()
    print(message_line(load.report(0)), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
