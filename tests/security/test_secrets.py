"""Keys and tokens stay in the environment: out of command lines, logs, the journal, metrics and errors."""

import re
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml
from fake_service import fake_config, said_by, serving, sloguard

from sidecar.config.schema import Config, ConfigError, load_config

API_KEY, HF_TOKEN, OUTER = "sk-0d7e5c0ffee-key", "hf_0d7e5c0ffee_token", "sk-0d7e5c0ffee-outer"
SECRETS = (API_KEY, HF_TOKEN, OUTER)


def command_lines() -> set[str]:
    """Command lines of every readable process of this machine."""
    found: set[str] = set()
    for process in psutil.process_iter():
        try:
            found.add(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def leaks(texts: dict[str, str]) -> list[str]:
    return [name for name, text in texts.items() if any(secret in text for secret in SECRETS)]


def written(config: Config, config_file: Path) -> dict[str, str]:
    """Every file of the state folder, and the sidecar's output."""
    files = [said_by(config_file), *(path for path in config.state.rglob("*") if path.is_file())]
    return {str(path): path.read_bytes().decode("latin-1") for path in files}


def test_a_whole_window_shows_no_secret_anywhere(tmp_path: Path) -> None:
    config_file = fake_config(tmp_path, engine={"env": {"VLLM_API_KEY": API_KEY, "HF_TOKEN": HF_TOKEN}})
    config = load_config(config_file)
    seen: set[str] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            seen.update(command_lines())
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    with serving(config_file, OTHER_API_KEY=OUTER):
        watcher.start()
        try:
            asked = sloguard("retune", "--now", "--wait", "-c", config_file)
        finally:
            ended.set()
            watcher.join()
        assert asked.returncode == 0, asked.stderr
        with urllib.request.urlopen(f"http://127.0.0.1:{config.metrics.port}/metrics", timeout=60) as response:
            metrics = response.read().decode()
        shown = {
            "argv": "\n".join(seen),
            "metrics": metrics,
            "retune": asked.stdout + asked.stderr,
            "status": sloguard("status", config.state, "--json").stdout,
            "trials": sloguard("trials", config.state, "--json").stdout,
        }
    assert any("--max-num-seqs" in line for line in seen), "no engine was seen"
    texts = written(config, config_file) | shown
    assert any(name.endswith("journal.sqlite") for name in texts)
    assert leaks(texts) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"engine: {{env: {{HF_TOKEN: {HF_TOKEN}: x}}}}", r"not YAML: line 1, column \d+: "),
        (f"engine:\n  env:\n  HF_TOKEN: '{HF_TOKEN}", r"not YAML: line \d+, column \d+: "),
        (f"model: a\nengine: {{env: {{HF_TOKEN: [{HF_TOKEN}]}}}}", r"engine\.env\.HF_TOKEN: a text is needed"),
    ],
)
def test_a_mistake_in_the_file_does_not_show_the_secret_beside_it(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "sloguard.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert re.search(said, str(raised.value))
    assert not leaks({"error": str(raised.value)})


@pytest.mark.parametrize("value", [20261122, 0.5, True, None])
def test_a_value_of_the_environment_is_not_shown(tmp_path: Path, value: object) -> None:
    path = fake_config(tmp_path, engine={"env": {"VLLM_API_KEY": value}})
    with pytest.raises(ConfigError, match=r"engine\.env\.VLLM_API_KEY: a text is needed") as raised:
        load_config(path)
    assert f" {value!r}:" not in str(raised.value)


@pytest.mark.parametrize("name", ["api-key", "hf-token"])
def test_a_secret_among_the_arguments_is_refused_and_not_shown(tmp_path: Path, name: str) -> None:
    path = fake_config(tmp_path)
    content = yaml.safe_load(path.read_text())
    content["engine"]["args"][name] = API_KEY
    path.write_text(yaml.safe_dump(content))

    refused = sloguard("serve", "-c", path)

    assert refused.returncode == 2
    assert "use the environment variable" in refused.stderr
    assert API_KEY not in refused.stderr
