"""Files of others: what is too large, has no end or expands without bound is refused quickly, in one line."""

import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from fake_service import fake_config, sloguard

from sidecar.config.schema import ConfigError, load_config
from vllm_sloguard.guard.bounded_read import MAX_MODEL_FILE_BYTES, read_small_file
from vllm_sloguard.guard.model_shape import read_shape
from vllm_sloguard.guard.start_history import model_key

_QUICKLY_S = 10.0
_STEPS = ("ab", "bc", "cd", "de", "ef", "fg")
_LISTS = "a: &a [x]\n" + "".join(f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in _STEPS)
_MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 10)}], {new}: 1}}\n" for old, new in _STEPS
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (_LISTS, "more than 20,000 values"),
        (_MERGES, "more than 20,000 values"),
        ("&a [*a]", "more than 20,000 values"),
        ("# " + "x" * 200_000_000, "larger than 64 KiB"),
        ("[" * 60_000, "not YAML"),
    ],
    ids=["list bomb", "merge bomb", "itself", "comment of 200 MB", "deep"],
)
def test_a_configuration_that_is_too_much_is_refused_quickly(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "sloguard.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(ConfigError, match=said) as refused:
        load_config(path)
    assert "\n" not in str(refused.value)
    assert time.process_time() - began < _QUICKLY_S


def test_a_few_aliases_and_merges_are_fine(tmp_path: Path) -> None:
    path = fake_config(tmp_path)
    content = yaml.safe_load(path.read_text())
    del content["window"]
    hooks = "{before_drain: &same [echo, window], after_restore: *same}"
    window = f"{{<<: {{duration: 7m, notice: 1s}}, duration: 5m, hooks: {hooks}}}"
    path.write_text(f"{yaml.safe_dump(content)}window: {window}\n")
    config = load_config(path)
    assert (config.window.duration, config.window.notice) == (300.0, 1.0)
    assert config.window.hooks.before_drain == config.window.hooks.after_restore == ["echo", "window"]


@pytest.mark.parametrize("name", ["--trust-remote-code", "", "a\nb", " a", "-a", "a\0b"])
def test_a_model_that_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    path = fake_config(tmp_path, model=name)
    refused = sloguard("plan", "-c", path)
    assert refused.returncode == 2
    assert "model: " in refused.stderr
    assert "a folder or a name such as Qwen/Qwen3-0.6B is needed" in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    ["api-ke", "--api_k", "ap", "apikey", "api-keys", "API_KEY", "hf-tok", "hf_tokens", "api_key.x", "api_key=sk-12"],
)
def test_a_secret_is_recognized_however_it_is_spelt(tmp_path: Path, name: str) -> None:
    path = fake_config(tmp_path)
    content = yaml.safe_load(path.read_text())
    content["engine"]["args"][name] = "sk-0d7e5c0ffee"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"engine\.args") as refused:
        load_config(path)
    assert "sk-" not in str(refused.value)


@pytest.mark.parametrize("name", ["por", "hos", "shutdown-time", "conf"])
def test_a_prefix_of_an_argument_of_the_sidecar_is_refused(tmp_path: Path, name: str) -> None:
    path = fake_config(tmp_path)
    content = yaml.safe_load(path.read_text())
    content["engine"]["args"][name] = 1
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="can't be set: "):
        load_config(path)


# config.json


def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OSError, match="not a regular file"):
        read_small_file(tmp_path / "config.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_shape(tmp_path)
    assert model_key(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/urandom"])
def test_a_device_without_an_end_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "config.json").symlink_to(target)
    with pytest.raises(OSError, match="not a regular file"):
        read_small_file(tmp_path / "config.json")


def test_a_file_that_grows_while_it_is_read_is_bounded(tmp_path: Path) -> None:
    path, ended = tmp_path / "config.json", threading.Event()

    def grow() -> None:
        with path.open("ab") as file:
            while not ended.is_set() and file.tell() < 200 * 2**20:
                file.write(b"x" * 2**20)

    path.touch()
    writer = threading.Thread(target=grow)
    writer.start()
    try:
        while path.stat().st_size <= MAX_MODEL_FILE_BYTES:
            time.sleep(0.01)
        with pytest.raises(OSError, match="larger than 4 MiB"):
            read_small_file(path)
    finally:
        ended.set()
        writer.join()


_BUDGET = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
from sidecar.cli.main import main
sys.argv = ["sloguard", *sys.argv[1:]]
main()
"""


def test_a_string_of_a_gigabyte_takes_no_gigabyte(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.write(b'{"architectures": ["')
        file.truncate(2**30)  # zeros, which take no space
    command = [sys.executable, "-c", _BUDGET, "budget", "--model", str(tmp_path)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "larger than 4 MiB" in done.stdout + done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert max(before, after) < 1.5 * 2**20  # KiB
