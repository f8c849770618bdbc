"""Every command: help with an example, JSON, exit codes, and messages for mistakes."""

import contextlib
import json
import os
import pty
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine_bench import DEMO, write_config
from fake_service import sloguard
from sidecar_cases import planned, served
from typer.main import get_command
from typer.testing import CliRunner

import sidecar
from sidecar.cli.bench import optimizer_names
from sidecar.cli.bench_promotion import RECORDED_STARTS
from sidecar.cli.grouped_help import GROUPS
from sidecar.cli.main import app, main
from sidecar.cli.places import config_of
from sidecar.config.schema import load_config
from sidecar.record import lock
from sidecar.record.decisions import Decision, Outcome
from sidecar.record.journal import Journal
from sidecar.record.trial import Result, Role
from sidecar.run.tuning_run import open_run
from vllm_sloguard import __version__

ROOT = Path(__file__).parents[3]
LANDSCAPE = ROOT / "benchmarks" / "landscapes" / "paper.py"
START = [sys.executable, "-m", "sidecar"]
# Typer has its own copy of click, without useful types.
Command = Any
# Arguments of each command with --json; STATE, CONFIG, MODEL and STUDY are replaced by the test.
ASKED = {
    "budget": "--model MODEL --gpu-total-gib 24 --gpu-free-gib 22.5",
    "repair": "--model MODEL --arg max_num_seqs=8 --gpu-total-gib 24 --gpu-free-gib 22.5",
    "history": "-c CONFIG",
    "status": "STATE",
    "trials": "STATE",
    "plan": "-c CONFIG",
    "doctor": "-c CONFIG --quick",
    "diagnose": str(ROOT / "tests/vllm_sloguard/crash/logs/port_in_use.log"),
    "dev bench promotion": "--windows 1",
    "dev bench optimizers": f"--landscape {LANDSCAPE} --optimizers random,tba --seeds 1 --budget 3",
    "dev study stats": "STUDY",
}
# These start real vLLM and are tested elsewhere.
STARTS_VLLM = {"dev bench restart"}


def walk(command: Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Command]]:
    children: dict[str, Command] = getattr(command, "commands", {})
    for name, child in children.items():
        if child.hidden:
            continue
        yield from walk(child, (*path, name))
    if not children:
        yield " ".join(path), command


COMMANDS = dict(walk(get_command(app)))


def has(command: Command, option: str) -> bool:
    return any(option in parameter.opts for parameter in command.params)


def in_process(*words: object) -> str:
    """What a command prints, run in this process, which saves it the imports."""
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A configuration with a run of three trials in its state folder."""
    path = write_config(tmp_path)
    config = load_config(path)
    journal = Journal(config.state)
    run = open_run(config, journal)
    for n in (4, 8, 16):
        journal.end_trial(journal.begin_trial(run.id, planned(max_num_seqs=n)), served(-80.0))
    journal.enter("serving", "for the tests")
    journal.close()
    return path


def test_the_walk_finds_the_commands() -> None:
    assert {"tune", "serve", "status", "plan", "doctor", "dev bench optimizers", "dev study stats"} <= set(COMMANDS)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_has_a_sentence_and_an_example_that_can_be_asked(name: str) -> None:
    shown = CliRunner().invoke(app, [*name.split(), "--help"])
    assert shown.exit_code == 0
    text = COMMANDS[name].help
    assert text
    first, *_, last = text.strip().splitlines()
    assert first.endswith((".", ":")) or first[0].isupper()
    assert last.strip().startswith(f"Example: sloguard {name}")
    command = re.split(" [<>] ", last.partition("Example: sloguard ")[2])[0]
    words = shlex.split(command)[len(name.split()) :]
    COMMANDS[name].make_context(name, words).close()  # raises for wrong arguments


@pytest.mark.parametrize("name", list(COMMANDS))
def test_options_and_arguments_say_what_they_are(name: str) -> None:
    untold = [p.name for p in COMMANDS[name].params if p.name not in ("help", "seed") and not getattr(p, "help", "")]
    assert not untold


def test_every_command_with_json_is_asked_for_it() -> None:
    assert {name for name, command in COMMANDS.items() if has(command, "--json")} == set(ASKED) | STARTS_VLLM


@pytest.mark.parametrize("name", list(ASKED))
def test_json_is_json_and_nothing_else(name: str, config_file: Path, tmp_path: Path) -> None:
    for run, latency in (("random_seed1", 900.0), ("tba_seed1", 800.0)):
        (tmp_path / "study" / run).mkdir(parents=True)
        line = json.dumps({"trial": 1, "status": "feasible", "avg_latency_ms": latency})
        (tmp_path / "study" / run / "results.jsonl").write_text(f"{line}\n{line}\n")
    places = {
        "STATE": str(load_config(config_file).state),
        "CONFIG": str(config_file),
        "MODEL": str(DEMO / "model"),
        "STUDY": str(tmp_path / "study"),
    }
    words = [places.get(word, word) for word in ASKED[name].split()]
    done = sloguard(*name.split(), *words, "--json")
    # With one window, the bounds of `dev bench promotion` can fail.
    assert done.returncode == 0 or name == "dev bench promotion", done.stderr
    assert json.loads(done.stdout, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


CONFIGURED = [name for name, command in COMMANDS.items() if has(command, "--config")]


@pytest.mark.parametrize("name", CONFIGURED)
@pytest.mark.parametrize("mistake", ["missing", "folder", "unreadable", "not YAML", "empty"])
def test_a_file_that_can_not_be_used_is_one_line(name: str, mistake: str, tmp_path: Path) -> None:
    path = tmp_path / "sloguard.yaml"
    match mistake:
        case "folder":
            path.mkdir()
        case "unreadable":
            path = Path("/proc/self/mem")  # unreadable even for root: nothing is mapped at address 0
        case "not YAML":
            path.write_text("a: b: c")
        case "empty":
            path.write_text("")
        case _:
            pass
    result = CliRunner().invoke(app, [*name.split(), "-c", str(path), *(["--quick"] if name == "doctor" else [])])
    if name == "doctor":  # a finding like any other
        assert result.exit_code == 1
        assert f"problem  configuration: {path}" in result.stdout
    else:
        assert type(result.exception).__name__ == "ConfigError"
        assert len(str(result.exception).splitlines()) == 1


Say = Callable[..., str]


@pytest.fixture
def one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """The single line of output of a command that fails; runs in this process, which is faster."""

    def asked(*words: object, code: int) -> str:
        monkeypatch.setattr("sys.argv", ["sloguard", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert (ended.value.code, output.out) == (code, ""), output.err
        assert len(output.err.splitlines()) == 1
        return output.err

    return asked


@pytest.mark.parametrize("name", ["status", "trials"])
def test_a_state_folder_that_can_not_be_used_is_one_line(name: str, tmp_path: Path, one_line: Say) -> None:
    assert "no journal.sqlite in it" in one_line(name, tmp_path / "missing", code=1)
    (tmp_path / "journal.sqlite").mkdir()
    assert "no journal.sqlite in it" in one_line(name, tmp_path, code=1)
    newer = tmp_path / "newer"
    Journal(newer).close()
    with sqlite3.connect(newer / "journal.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    assert "journal of version 99; this sloguard knows version" in one_line(name, newer, code=1)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "journal.sqlite").write_bytes(b"not a database, but long enough to be looked at" * 20)
    assert "file is not a database" in one_line(name, damaged, code=1)


def test_status_tells_how_the_last_sidecar_ended(config_file: Path, tmp_path: Path) -> None:
    state = load_config(config_file).state
    Journal(tmp_path / "new").close()

    def output(folder: Path = state) -> list[str]:
        return in_process("status", folder).splitlines()

    assert output(tmp_path / "new")[0] == "sidecar: not running; `sloguard serve` has never run on this state folder"
    killed = "sidecar: not running; it was killed, or the machine went down; its last state was serving since 20"
    assert output()[0].startswith(killed)
    Journal(state).enter("halted", "stopped, with its engine")
    assert re.fullmatch(
        r"sidecar: not running; it ended 20.{17} [A-Z]+ \(0 s ago\): stopped, with its engine", output()[0]
    )
    with lock.held(state):
        assert output()[0] == f"sidecar: process {os.getpid()}, `sloguard tune`, not serving"
        Journal(state).end_run(1, Decision(Outcome.KEPT, "for the tests"))
        assert output()[0] == f"sidecar: process {os.getpid()}, starting or stopping"
        for name, until in (("starting", None), ("tuning", 3e9), ("serving", 3e9)):
            Journal(state).enter(name, "for the tests", until)
            assert any(text.startswith(f"sidecar: process {os.getpid()}, {name} since 20") for text in output())
            assert ("the window ends at 2065" in in_process("status", state)) is (name == "tuning")


def test_status_tells_that_the_current_configuration_misses_the_slo(config_file: Path) -> None:
    state = load_config(config_file).state
    assert "\nSLO: unknown: " in in_process("status", state)
    journal = Journal(state)
    journal.end_trial(journal.begin_trial(1, planned(Role.BASELINE)), Result(violation=0.5))
    journal.close()
    output = in_process("status", state)
    assert "\nSLO: missed: a limit was missed; trial 4 of run 1, 20" in output
    found = json.loads(in_process("status", state, "--json"))
    assert (found["misses_slo"], found["slo"]["compliance"]) == (4, "missed")


@pytest.mark.parametrize("name", ["plan", "history", "tune"])
def test_a_state_folder_of_a_newer_version_stops_every_command(name: str, config_file: Path, one_line: Say) -> None:
    with sqlite3.connect(load_config(config_file).state / "journal.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    assert "journal of version 99" in one_line(name, "-c", config_file, code=1)


def test_a_file_in_place_of_the_state_folder(config_file: Path, tmp_path: Path, one_line: Say) -> None:
    content = yaml.safe_load(config_file.read_text())
    content["state"] = str(tmp_path / "file")
    (tmp_path / "file").write_text("")
    config_file.write_text(yaml.safe_dump(content))
    assert str(tmp_path / "file") in one_line("tune", "-c", config_file, code=1)
    assert "no journal.sqlite in it" in one_line("history", "-c", config_file, code=1)


def test_orders_to_nobody(config_file: Path, one_line: Say) -> None:
    for words in (("pause",), ("resume",), ("abort",), ("retune", "--now")):
        assert "no `sloguard serve` answers" in one_line(*words, "-c", config_file, code=1)
    assert "--for: '20': a duration such as" in one_line("retune", "--now", "--for", "20", "-c", config_file, code=2)
    assert "--now is required" in one_line("retune", "-c", config_file, code=2)


@pytest.mark.parametrize("words", [("nonsense",), ("status",), ("plan", "--nonsense"), ("dev", "bench", "nonsense")])
def test_a_mistake_in_the_command_is_code_2(words: tuple[str, ...]) -> None:
    done = sloguard(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words", [("trials", "STATE"), ("trials", "STATE", "--json"), ("plan", "-c", "CONFIG"), ("--help",)]
)
def test_a_closed_pipe_ends_it_quietly(words: tuple[str, ...], config_file: Path) -> None:
    state = load_config(config_file).state
    journal = Journal(state)
    for n in range(300):
        journal.begin_trial(1, planned(max_num_seqs=n + 1))
    journal.close()
    places = {"STATE": state, "CONFIG": config_file}
    line = shlex.join([*START, *(str(places.get(word, word)) for word in words)])
    done = subprocess.run(["bash", "-c", f"{line} | head -1"], capture_output=True, text=True, check=False, timeout=300)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) <= 1


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.3, 3.0])
def test_ctrl_c_at_any_moment_has_no_traceback(after_s: float) -> None:
    asked = subprocess.Popen(
        [*START, "dev", "bench", "promotion"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    # During the imports; before them, Python itself would be interrupted.
    while "pydantic_core" not in Path(f"/proc/{asked.pid}/maps").read_text():
        time.sleep(0.002)
    time.sleep(after_s)
    asked.send_signal(signal.SIGINT)
    _, said = asked.communicate(timeout=120)
    assert asked.returncode in (130, -signal.SIGINT)
    assert said == ""


def test_ctrl_c_while_it_waits_for_a_sidecar(config_file: Path) -> None:
    state = load_config(config_file).state
    with lock.held(state):  # a sidecar that never serves again
        journal = Journal(state)
        journal.promote(None, load_config(config_file).base_digest(), {"max_num_seqs": 8})
        journal.enter("restoring", "for the tests")
        code = (
            "from sidecar.cli import main as cli, operator as o; o._call = lambda *_: None; ticks = o._ticks\n"
            "o._ticks = lambda *given: print('it waits', flush=True) or ticks(*given)\n"
            "cli.main()"
        )
        command = [sys.executable, "-c", code, "rollback", "--wait", "-c", str(config_file)]
        asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert asked.stdout is not None
        assert asked.stdout.readline().startswith("vLLM will be down for about ")
        assert asked.stdout.readline() == "it waits\n"
        time.sleep(0.3)
        asked.send_signal(signal.SIGINT)
        said, errors = asked.communicate(timeout=120)
    assert (asked.returncode, errors) == (130, "")
    assert "Traceback" not in said


def on_a_terminal(*words: object) -> tuple[str, str]:
    """The output of a command with stdout on a pipe and stderr on a terminal."""
    ours, theirs = pty.openpty()
    command = [*START, *map(str, words)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, text=True, env={**os.environ, "TERM": "xterm"}
    ) as asked:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 4096):
                shown += piece
        except OSError:  # the other end is closed
            pass
        assert asked.stdout is not None
        said = asked.stdout.read()
    os.close(ours)
    return said, shown.decode()


def test_progress_is_for_terminals_and_keeps_out_of_what_is_printed(config_file: Path) -> None:
    said, shown = on_a_terminal("doctor", "-c", config_file, "--quick", "--json")
    assert json.loads(said)["findings"]
    assert "checking" in shown
    plain = sloguard("doctor", "-c", config_file, "--quick", "--json")
    assert plain.stderr == ""


def answered(words: list[object], answer: str) -> tuple[int, str]:
    """The exit code and the output of a command on a terminal where ``answer`` is typed."""
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    with subprocess.Popen([*START, *map(str, words)], stdin=theirs, stdout=theirs, stderr=theirs) as asked:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(ours, 4096):
                shown += piece
    os.close(ours)
    return asked.returncode, shown.decode()


def test_what_takes_the_service_away_says_for_how_long_and_asks_on_a_terminal(config_file: Path) -> None:
    state = load_config(config_file).state
    with lock.held(state):
        code, said = answered(["retune", "--now", "-c", config_file], "n\n")
        assert code == 1
        assert "vLLM will be down for up to 30 min, until 20" in said
        assert "Continue? [y/N]" in said
        assert "sloguard: nothing was changed" in said
        for words, answer in ((["retune", "--now", "--yes"], ""), (["retune", "--now"], "y\n"), (["abort", "-y"], "")):
            code, said = answered([*words, "-c", config_file], answer)
            assert code == 1
            assert "no `sloguard serve` answers" in said  # it was asked
        assert sloguard("abort", "-c", config_file).stdout == ""  # no window is open
        Journal(state).enter("tuning", "for the tests", 3e9)
        done = sloguard("abort", "-c", config_file)  # without a terminal, nobody can be asked
        assert done.stdout.startswith("vLLM will serve again in about ")
        assert "no `sloguard serve` answers" in done.stderr


def test_json_is_indented_on_a_terminal_alone_and_latencies_are_positive(config_file: Path) -> None:
    _, shown = answered(["trials", config_file, "--json"], "")
    assert shown.startswith('[\r\n  {\r\n    "run": 1')
    plain = sloguard("trials", config_file, "--json").stdout
    assert len(plain.splitlines()) == 1
    assert json.loads(shown) == json.loads(plain)
    assert {trial["result"]["value"] for trial in json.loads(plain)} == {80.0}


def test_commands_are_listed_in_groups() -> None:
    listed = CliRunner().invoke(app, ["--help"]).stdout
    titles = ["Set up:", "Serve and tune:", "See what happened:", "Maintain and develop:"]
    assert [line for line in listed.splitlines() if line in titles] == titles
    public = {name.split()[0] for name in COMMANDS}
    assert public == {name for names in GROUPS.values() for name in names}


def test_plan_takes_a_file_or_a_state_folder(config_file: Path) -> None:
    state = load_config(config_file).state
    outputs = [sloguard("plan", *words, "--json") for words in (["-c", config_file], [config_file], [state])]
    knobs = [json.loads(done.stdout)["knobs"] for done in outputs]
    assert knobs[0] == knobs[1] == knobs[2]


def completed(line: str, folder: Path) -> list[str]:
    """Bash's completions at the end of ``line``."""
    code = "import sys; sys.argv = ['sloguard']; from sidecar.__main__ import main; main()"
    words = line.split(" ")
    environment = {
        **os.environ,
        "_SLOGUARD_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env=environment, timeout=300
    )
    return [found for found in done.stdout.split("\n") if found]


def test_completion(config_file: Path) -> None:
    folder = config_file.parent
    (folder / "other").mkdir()
    assert completed("sloguard sta", folder) == ["status"]
    assert completed("sloguard status ", folder) == ["state", "sloguard.yaml", "other/"]
    assert completed("sloguard trials s", folder) == ["state", "sloguard.yaml"]
    assert completed("sloguard dev bench optimizers --optimizers tba", folder) == ["tba", "tba-tpe"]
    assert completed("sloguard dev bench optimizers --optimizers random,tp", folder) == ["random,tpe"]
    assert optimizer_names("tba,tba") == ["tba,tba-tpe"]


def test_the_former_names_of_development_commands_work_but_are_not_listed(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["--help"]).stdout
    assert re.search(r"^\s+dev\s", listed, re.MULTILINE)
    assert not re.search(r"^\s+(bench|study)\s", listed, re.MULTILINE)
    assert "promotion" in CliRunner().invoke(app, ["bench", "--help"]).stdout
    assert CliRunner().invoke(app, ["study", "stats", str(tmp_path / "absent")]).exit_code != 0


def test_bench_promotion_needs_no_file_outside_the_package(tmp_path: Path) -> None:
    command = [*START, "dev", "bench", "promotion", "--windows", "1", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path, env=environment
    )
    assert json.loads(done.stdout), done.stderr
    assert RECORDED_STARTS.is_relative_to(Path(sidecar.__file__).parent)


def test_bench_restart_asks_for_a_configuration() -> None:
    done = sloguard("dev", "bench", "restart")
    assert done.returncode == 2
    assert "--config" in done.stderr


def test_version() -> None:
    assert sloguard("--version").stdout == f"sloguard {__version__}\n"


def test_a_run_records_the_version_that_made_it(config_file: Path) -> None:
    journal = Journal(load_config(config_file).state, read_only=True)
    assert journal.run_configs()[1]["sloguard"] == __version__


EITHER = [name for name, command in COMMANDS.items() if any("[STATE]" in str(p.metavar) for p in command.params)]


def test_the_commands_that_take_a_state_folder_or_a_file() -> None:
    given = {"status", "history", "trials", "report", "export", "retune", "pause", "resume", "abort", "rollback"}
    assert given <= set(EITHER)


@pytest.mark.parametrize("name", EITHER)
def test_a_state_folder_and_a_file_mean_the_same(name: str, config_file: Path, tmp_path: Path) -> None:
    more = {"report": ["-o", tmp_path / "r.html"], "export": ["--csv", tmp_path / "t.csv"], "retune": ["--now"]}
    state = load_config(config_file).state
    answers = [
        CliRunner().invoke(app, [name, *map(str, words), *map(str, more.get(name, []))])
        for words in (["-c", config_file], [config_file], [state])
    ]
    assert len({(done.exit_code, done.stdout, str(done.exception)) for done in answers}) == 1
    for words in ([], ["-c", str(config_file), str(state)]):
        assert type(CliRunner().invoke(app, [name, *words]).exception).__name__ == "ConfigError"


def test_completion_can_be_installed() -> None:
    # Typer detects the shell that it is called from.
    command = ["bash", "-c", f"{shlex.join([*START, '--show-completion'])}; true"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "_COMPLETE=complete_bash" in shown.stdout, shown.stderr
    assert "--install-completion" in sloguard("--help").stdout


def test_plan_prints_warnings_and_why_the_memory_is_not_computed(tmp_path: Path) -> None:
    content = yaml.safe_load(write_config(tmp_path).read_text())
    content["slo"]["ttft_p99_ms"] = 2
    content["engine"]["python"] = "/usr/bin/env"  # without vLLM
    content["engine"]["args"]["speculative-config"] = {"method": "ngram", "num_speculative_tokens": 2}
    path = tmp_path / "sloguard.yaml"
    path.write_text(yaml.safe_dump(content))
    output = sloguard("plan", "-c", path).stdout
    assert re.search(r"^warning: line \d+: slo\.ttft_p99_ms: 2 ms is less than one forward pass takes;", output, re.M)
    assert "memory: not computed: these arguments change the model" in output


def test_a_model_on_the_hub_that_is_not_cached_says_how_to_bring_it() -> None:
    done = sloguard("budget", "--model", "Qwen/Absent-8B")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "sloguard: --model: no config.json of Qwen/Absent-8B on this machine;"
        " `hf download Qwen/Absent-8B config.json` brings it\n"
    )


@pytest.mark.parametrize(
    "engine",
    [{}, {"agents": ["local"]}, {"agents": ["unix:///run/agent.sock"], "agent_lease_s": 5}, {"watch_only": True}],
)
def test_a_recorded_configuration_can_be_read_again(engine: dict[str, Any], tmp_path: Path) -> None:
    path = write_config(tmp_path, engine=engine)
    content = yaml.safe_load(path.read_text())
    del content["engine"]["env"]  # where the agent is started elsewhere, it is the agent's
    path.write_text(yaml.safe_dump(content))
    config = load_config(path)
    journal = Journal(config.state)
    open_run(config, journal)
    journal.close()
    assert config_of(config.state, None).engine.model_dump(exclude={"python", "env"}) == config.engine.model_dump(
        exclude={"python", "env"}
    )
