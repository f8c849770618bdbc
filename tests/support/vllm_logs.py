"""Builds logs as vLLM prints them: V1 and V0 prefixes, tracebacks, chains, container runtimes."""

# ruff: noqa: E501 - the logs' own lines

from vllm_sloguard.crash import Crash

DIRECT = "\nThe above exception was the direct cause of the following exception:\n"
HANDLING = "\nDuring handling of the above exception, another exception occurred:\n"


def v1(process: str, text: str, *, level: str = "ERROR", source: str = "core.py:708", pid: int = 7) -> str:
    """Records of vLLM 0.10 and later: every line of ``text`` has the process and the level in front."""
    return "\n".join(f"({process} pid={pid}) {level} 11-22 05:29:01 [{source}] {line}" for line in text.split("\n"))


def v08(text: str, *, level: str = "ERROR", source: str = "core.py:390") -> str:
    """Records of the V1 engine in vLLM 0.8, which names no process."""
    return "\n".join(f"{level} 05-12 19:01:18 [{source}] {line}" for line in text.split("\n"))


def v0(text: str, *, level: str = "ERROR", source: str = "engine.py:366", process: str = "") -> str:
    """Records of the V0 engine, vLLM 0.5 to 0.8."""
    who = f"({process} pid=93) " if process else ""
    return "\n".join(f"{who}{level} 11-18 18:07:28 {source}] {line}" for line in text.split("\n"))


def printed(process: str, text: str, *, pid: int = 7) -> str:
    """What a process prints to stderr itself."""
    return "\n".join(f"({process} pid={pid}) {line}" for line in text.split("\n"))


def traceback(exception: str, *source: str) -> str:
    """A traceback that ends with ``exception``; ``source`` are its source lines."""
    frames = [
        f'  File "/usr/lib/python3/site-packages/vllm/part_{number}.py", line {number + 40}, in run\n    {line}'
        for number, line in enumerate(source or ("return func(*args, **kwargs)",))
    ]
    return "\n".join(["Traceback (most recent call last):", *frames, exception])


def prefixed(prefix: str, text: str) -> str:
    """``text`` as a container runtime or a log collector shows it."""
    return "\n".join(f"{prefix}{line}" for line in text.split("\n"))


def serving() -> str:
    """The lines of a server that has started and answers."""
    return "\n".join(
        [
            "INFO:     Application startup complete.",
            'INFO:     127.0.0.1:50052 - "POST /v1/chat/completions HTTP/1.1" 200 OK',
            "(APIServer pid=1) INFO 11-22 05:28:51 [loggers.py:118] Engine 000: Avg prompt throughput: 6.5 tokens/s",
        ]
    )


def engine_dead() -> str:
    """The API server's report of an engine that has died."""
    end = "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause."
    return v1("APIServer", f"AsyncLLM output_handler failed.\n{traceback(end)}", source="async_llm.py:480")


def start_failed(*, failed: str = "{}") -> str:
    """The API server's report of an engine that did not start."""
    end = f"RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {failed}"
    return printed("APIServer", traceback(end, "wait_for_engine_startup("), pid=1)


def names_its_line(crash: Crash, log: str) -> bool:
    """Whether the line that the crash points at holds its evidence, or a good part of evidence from several lines."""
    if crash.line_number is None:
        return False
    line = log.split("\n")[crash.line_number - 1]
    size = min(20, len(crash.evidence))
    return any(crash.evidence[at : at + size] in line for at in range(len(crash.evidence) - size + 1))
