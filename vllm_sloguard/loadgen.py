"""vLLM's own benchmark client, kept alive: importing it takes longer than most measurements.

``python -m vllm_sloguard.loadgen`` reads one JSON object a line from its standard input, and answers with one line:

    {"argv": ["--model", ...], "request_timeout_s": 60}   →   {"result": {...}} or {"error": "..."}

``argv`` is that of ``vllm bench serve``, and ``result`` is what it returns with ``--save-detailed``. A request counts
as failed, with its reason in ``errors``, when it is answered late or with fewer tokens than were asked for: vLLM
answers an aborted request with status 200.
"""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TextIO

RequestFunction = Callable[..., Awaitable[Any]]


def main() -> int:
    """Serves until the end of the input."""
    # The benchmark prints to standard output; the answers get the real one for themselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    from vllm.benchmarks import serve
    from vllm.benchmarks.lib.endpoint_request_func import ASYNC_REQUEST_FUNCS
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plain = ASYNC_REQUEST_FUNCS["openai"]
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)

    def run(request: dict[str, Any]) -> dict[str, Any]:
        ASYNC_REQUEST_FUNCS["openai"] = _judged(plain, float(request["request_timeout_s"]))
        arguments = parser.parse_args(request["argv"])
        assert arguments is not None
        return serve.main(arguments)

    _answer(answers, {"ready": True})
    for line in sys.stdin:
        _answer(answers, _attempt(run, line))
    return 0


def _attempt(run: Callable[[dict[str, Any]], dict[str, Any]], line: str) -> dict[str, Any]:
    try:
        return {"result": run(json.loads(line))}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the process boundary: it is an answer too
        return {"error": f"{type(error).__name__}: {error}"}


def _judged(plain: RequestFunction, timeout_s: float) -> RequestFunction:
    """``plain`` with a deadline for each request, and with short answers counted as failures."""
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput

    async def send(request_func_input: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            output = await asyncio.wait_for(plain(request_func_input, *args, **kwargs), timeout_s)
        except TimeoutError:
            output = RequestFuncOutput(prompt_len=request_func_input.prompt_len)
            output.error = f"no answer within {timeout_s:g} s"
            return output
        asked = request_func_input.output_len
        if output.success and request_func_input.ignore_eos and output.output_tokens < asked:
            output.success = False
            output.error = f"aborted after {output.output_tokens} of {asked} tokens"
        if not output.success and not output.error:
            output.error = "failed without a reason"
        return output

    return send


def _answer(stream: TextIO, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer, default=float) + "\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
