"""The Kubernetes manifests: their schemas, and the behaviour that probes and hooks rely on."""

import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import kubernetes_validate  # pyright: ignore[reportMissingTypeStubs]
import pytest
import yaml
from fake_service import await_state, fake_config, serving, sloguard

from sidecar.config.schema import Config, load_config
from sidecar.record.journal import Journal

MANIFEST = Path(__file__).parents[2] / "deploy" / "kubernetes" / "sloguard.yaml"
OBJECTS: dict[str, Any] = {found["kind"]: found for found in yaml.safe_load_all(MANIFEST.read_text())}
VERSIONS = ("1.29", "1.37")
_STOP_GRACE_S, _KILL_S = 10, 60  # of sidecar.engine


@pytest.fixture(scope="module")
def pod() -> Any:
    """The pod's spec."""
    return OBJECTS["StatefulSet"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod: Any) -> Any:
    """The one container."""
    [only] = pod["containers"]
    return only


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The configuration file in the ConfigMap, loaded."""
    path = tmp_path / "sloguard.yaml"
    path.write_text(OBJECTS["ConfigMap"]["data"]["sloguard.yaml"])
    return load_config(path)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", sorted(OBJECTS))
def test_manifests_fit_the_schemas_of_kubernetes(kind: str, version: str) -> None:
    kubernetes_validate.validate(OBJECTS[kind], version, strict=True)


def test_a_mistake_would_be_found() -> None:
    wrong = yaml.safe_load(yaml.safe_dump(OBJECTS["StatefulSet"]))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_names_ports_and_folders_go_together(pod: Any, container: Any, config: Config) -> None:
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": config.engine.port, "metrics": config.metrics.port}
    assert {p["targetPort"] for p in OBJECTS["Service"]["spec"]["ports"]} == set(ports)
    assert config.engine.host == config.metrics.host == "0.0.0.0"  # noqa: S104 - within the pod's own network
    labels = OBJECTS["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    assert OBJECTS["Service"]["spec"]["selector"].items() <= labels.items()
    assert OBJECTS["StatefulSet"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    mounts = {mount["name"]: Path(mount["mountPath"]) for mount in container["volumeMounts"]}
    # The mode of the mount depends on the volume.
    assert mounts["state"] in config.state.parents
    assert Path(container["command"][-1]) == mounts["config"] / "sloguard.yaml"
    claims = {claim["metadata"]["name"] for claim in OBJECTS["StatefulSet"]["spec"]["volumeClaimTemplates"]}
    assert set(mounts) == claims | {volume["name"] for volume in pod["volumes"]}


def test_no_secret_is_in_the_manifests(container: Any) -> None:
    assert "env" not in container
    assert [source for source in container["envFrom"] if "secretRef" not in source] == []
    assert "Secret" not in OBJECTS


def test_a_pod_is_given_the_time_that_it_takes(pod: Any, container: Any, config: Config) -> None:
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > config.engine.start_timeout_s
    taken = pre_stop_s(container) + config.engine.drain_timeout_s + _STOP_GRACE_S + _KILL_S
    assert pod["terminationGracePeriodSeconds"] > taken
    ready = container["readinessProbe"]
    assert config.window.notice > ready["periodSeconds"] * ready["failureThreshold"]


def pre_stop(container: Any) -> list[str]:
    return container["lifecycle"]["preStop"]["exec"]["command"]


def pre_stop_s(container: Any) -> int:
    words = pre_stop(container)[-1].split()
    return int(words[words.index("sleep") + 1].rstrip(";"))


def status(config: Config, probe: Any) -> int:
    """The response that the probe gets."""
    assert probe["httpGet"]["port"] == "metrics"
    try:
        url = f"http://127.0.0.1:{config.metrics.port}{probe['httpGet']['path']}"
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_probes_and_the_end_of_a_pod(tmp_path: Path, container: Any, config: Config) -> None:
    config_file = fake_config(tmp_path)
    own = load_config(config_file)
    with serving(config_file, FAKE_LOAD_S="60") as process:
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert status(own, container[name]) == 200

        assert sloguard("retune", "--now", "-c", config_file).returncode == 0
        await_state(own.state, "tuning", process)
        # Removed from the Service, not restarted.
        assert status(own, container["readinessProbe"]) == 503
        assert status(own, container["livenessProbe"]) == 200

        hook = [word.replace(str(config.state), str(own.state)) for word in pre_stop(container)]
        hook[-1] = hook[-1].replace(f"sleep {pre_stop_s(container)}", "sleep 0")
        began = time.monotonic()
        stopped = subprocess.Popen(hook)
        assert process.wait(120) == 0
        assert stopped.wait(60) == 0
        assert time.monotonic() - began < own.engine.drain_timeout_s + _STOP_GRACE_S + _KILL_S
        assert Journal(own.state, read_only=True).engines() == []
