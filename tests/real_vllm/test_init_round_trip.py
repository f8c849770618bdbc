"""What `sloguard init` writes gives vLLM's own parser the same arguments, and the table of arguments is vLLM's."""

import json
import shlex
import subprocess
import sys
from typing import Any

import pytest
from launch_cases import LAUNCH_CASES
from typer.testing import CliRunner

from sidecar.cli.main import app
from sidecar.config.schema import load_config
from sidecar.config.vllm_arguments import OTHER_NAMES, SHORT_NAMES, VLLM_ARGUMENTS, ValueKind
from vllm_sloguard.agent.serve_command import flags

# Reads lines of arguments; prints what vLLM's parser makes of each, and its options.
PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
def parsed(words):
    try: return repr(sorted(vars(parser.parse_args(words)).items()))
    except SystemExit: return "refused"
answers = [parsed(words) for words in json.load(sys.stdin)]
options = [(a.option_strings, type(a).__name__, a.nargs, getattr(a.type, "__name__", "")) for a in parser._actions]
print(json.dumps({"answers": answers, "options": options}))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], list[str]]]:
    """By case, vLLM's arguments before `init`, and those that sloguard would start it with."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for number, (name, case) in enumerate(LAUNCH_CASES.items()):
        folder = tmp_path_factory.mktemp(f"case{number}")
        output = folder / "sloguard.yaml"
        done = CliRunner().invoke(app, ["init", case.option, case.source(folder), "-o", str(output)])
        assert done.exit_code == 0, done.exception
        config = load_config(output)
        args = {n: v for n, v in config.engine.args.items() if n not in case.foreign}
        before = shlex.split(case.words)
        found[name] = (before, [config.model, *flags(args)])
    return found


@pytest.fixture(scope="module")
def vllm(written: dict[str, tuple[list[str], list[str]]]) -> dict[str, Any]:
    lines = [words for pair in written.values() for words in pair]
    done = subprocess.run(
        [sys.executable, "-c", PARSE], input=json.dumps(lines), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize("number", range(len(LAUNCH_CASES)), ids=list(LAUNCH_CASES))
def test_vllm_reads_the_same_arguments(number: int, vllm: dict[str, Any]) -> None:
    before, after = vllm["answers"][2 * number : 2 * number + 2]
    assert before != "refused"
    assert after == before


def test_the_table_has_vllms_arguments(vllm: dict[str, Any]) -> None:
    found: dict[str, tuple[str, str | int | None, str]] = {}
    short: dict[str, str] = {}
    for options, kind, count, value in vllm["options"]:
        longs = [option for option in options if option.startswith("--") and not option.startswith("--no-")]
        if not longs or longs[0] == "--help":
            continue
        name = longs[0][2:].replace("-", "_")
        found[name] = (kind, count, value)
        short |= {o.lstrip("-").replace("-", "_"): name for o in options if o != longs[0] and not o.startswith("--no-")}
    assert set(found) == set(VLLM_ARGUMENTS)
    assert short == {**SHORT_NAMES, **OTHER_NAMES}
    for name, (kind, count, value) in found.items():
        mine = VLLM_ARGUMENTS[name]
        assert (mine is ValueKind.SWITCH) == (kind == "BooleanOptionalAction"), name
        assert (mine is ValueKind.FLAG) == (kind == "_StoreTrueAction"), name
        assert (mine is ValueKind.LIST) == (count == "+"), name
        assert (mine is ValueKind.INTEGER) == (value == "int" and count is None), name
