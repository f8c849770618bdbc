"""Over TCP, commands need a client certificate and the token."""

import socket
import subprocess
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from certificates import certificate
from fake_service import fake_config, said_by, serving, sloguard, state_of
from own_ports import own_port

from sidecar.config.schema import Config, ConfigError, Remote, load_config
from sidecar.service import remote_rpc
from vllm_sloguard.wire import control_pb2
from vllm_sloguard.wire.control_pb2_grpc import ControlServiceStub

TOKEN = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of a server, of a client, and of a client with another signer."""
    folder = tmp_path_factory.mktemp("keys")
    for name, signer in (("ca", ""), ("other-ca", ""), ("server", "ca"), ("client", "ca"), ("stranger", "other-ca")):
        certificate(folder, name, signer)
    for name, token in (("token", TOKEN), ("wrong-token", TOKEN[::-1]), ("short-token", "secret")):
        (folder / name).write_text(token + "\n")
        (folder / name).chmod(0o600)
    return folder


@dataclass(frozen=True)
class Served:
    """A sidecar that accepts calls over TCP."""

    config_file: Path
    config: Config
    section: dict[str, Any]


@pytest.fixture(scope="module")
def served(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Served]:
    """One sidecar for the module."""
    files = {"certificate": "server.pem", "key": "server.key", "ca": "ca.pem", "token": "token"}
    section = {"address": f"127.0.0.1:{own_port()}", **{k: str(keys / v) for k, v in files.items()}}
    config_file = fake_config(tmp_path_factory.mktemp("served"), remote=section)
    with serving(config_file):
        yield Served(config_file, load_config(config_file), section)


def elsewhere(served: Served, folder: Path, **files: str) -> Path:
    """The configuration file of a client on another machine, which has no socket."""
    content = yaml.safe_load(served.config_file.read_text())
    own = {"certificate": "client.pem", "key": "client.key", **files}
    keys = Path(served.section["ca"]).parent
    content |= {"state": str(folder / "none"), "remote": served.section | {k: str(keys / v) for k, v in own.items()}}
    path = folder / "client.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def asked(config_file: Path, metadata: tuple[tuple[str, str], ...] | None = None) -> grpc.StatusCode:
    """The status of a call that an authorised caller would see refused for its content."""
    request = control_pb2.RetuneRequest(duration_seconds=-1)
    with remote_rpc.channel(load_config(config_file)) as (channel, own), pytest.raises(grpc.RpcError) as refused:
        ControlServiceStub(channel).Retune(request, timeout=60, metadata=own if metadata is None else metadata)
    assert isinstance(refused.value, grpc.Call)
    return refused.value.code()


def test_a_client_with_certificate_and_token_is_heard(served: Served, tmp_path: Path) -> None:
    assert asked(elsewhere(served, tmp_path)) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("given", [None, "", "Bearer ", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", TOKEN, "Bearer é"])
def test_a_client_without_the_token_is_refused(served: Served, tmp_path: Path, given: str | None) -> None:
    metadata = () if given is None else (("authorization", given.encode().decode("latin-1")),)
    assert asked(elsewhere(served, tmp_path), metadata) is not grpc.StatusCode.INVALID_ARGUMENT
    if given is None or given.isascii():
        assert asked(elsewhere(served, tmp_path), metadata) is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    "files",
    [
        {"certificate": "stranger.pem", "key": "stranger.key"},  # signed by somebody else
        {"ca": "other-ca.pem"},  # a server that is not the one that the client trusts
    ],
)
def test_certificates_are_checked_on_both_sides(served: Served, tmp_path: Path, files: dict[str, str]) -> None:
    assert asked(elsewhere(served, tmp_path, **files)) is grpc.StatusCode.UNAVAILABLE


def test_a_client_without_a_certificate_or_without_tls_is_refused(served: Served) -> None:
    assert served.config.remote is not None
    trusted = grpc.ssl_channel_credentials(served.config.remote.ca.read_bytes())
    address = served.config.remote.address
    for channel in (grpc.secure_channel(address, trusted), grpc.insecure_channel(address)):
        with channel, pytest.raises(grpc.RpcError) as refused:
            ControlServiceStub(channel).Retune(
                control_pb2.RetuneRequest(), timeout=60, metadata=(("authorization", f"Bearer {TOKEN}"),)
            )
        assert isinstance(refused.value, grpc.Call)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_telemetry_is_not_taken_over_tcp(served: Served, tmp_path: Path) -> None:
    with remote_rpc.channel(load_config(elsewhere(served, tmp_path))) as (channel, metadata):
        publish: Any = channel.unary_unary("/sloguard.v1.TelemetryService/Publish")  # pyright: ignore[reportUnknownVariableType]
        with pytest.raises(grpc.RpcError) as refused:
            publish(b"", timeout=60, metadata=metadata)
    assert isinstance(refused.value, grpc.Call)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_command_asks_over_tcp_where_there_is_no_socket(served: Served, tmp_path: Path) -> None:
    refused = sloguard("retune", "--now", "-c", elsewhere(served, tmp_path, **{"token": "wrong-token"}))
    assert (refused.returncode, refused.stderr) == (1, "sloguard: a token is needed\n")
    assert state_of(served.config.state) == "serving"

    taken = sloguard("retune", "--now", "-c", elsewhere(served, tmp_path))
    assert taken.returncode == 0, taken.stderr
    assert TOKEN not in said_by(served.config_file).read_text()


def test_the_port_is_not_shared(served: Served) -> None:
    assert served.config.remote is not None
    with pytest.raises(OSError, match=r"remote\.address: 127\.0\.0\.1:"):
        remote_rpc.serve_remote(served.config.remote, lambda _: None)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("key", "none.key", "remote.key: .*none.key: No such file"),
        ("token", "short-token", "remote.token: .*: 32 printable characters or more are needed"),
    ],
)
def test_files_that_can_not_be_used_are_one_line(keys: Path, served: Served, name: str, change: str, said: str) -> None:
    assert served.config.remote is not None
    with pytest.raises(ConfigError, match=said):
        remote_rpc.serve_remote(served.config.remote.model_copy(update={name: keys / change}), lambda _: None)


@pytest.mark.parametrize("name", ["key", "token"])
def test_a_secret_that_others_can_read_is_refused(tmp_path: Path, served: Served, name: str) -> None:
    assert served.config.remote is not None
    path = tmp_path / "copy"
    path.write_bytes(getattr(served.config.remote, name).read_bytes())
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=f"remote.{name}: .* is open to others; chmod 600 it"):
        remote_rpc.serve_remote(served.config.remote.model_copy(update={name: path}), lambda _: None)


@pytest.mark.parametrize("address", ["", "9465", "host", "host:port", ":9465", "a b:1", "unix:/tmp/s", "host:123456"])
def test_an_address_is_a_host_and_a_port(keys: Path, address: str) -> None:
    with pytest.raises(ValueError, match="a host and a port are needed"):
        Remote(address=address, certificate=keys, key=keys, ca=keys, token=keys)


def test_nothing_listens_on_tcp_unless_asked(tmp_path: Path) -> None:
    config_file = fake_config(tmp_path)
    with serving(config_file) as process:
        config = load_config(config_file)
        listening = subprocess.run(["cat", "/proc/net/tcp"], capture_output=True, text=True, check=True).stdout
        inodes: set[str] = set()
        for fd in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # it was open for a moment
                if (link := str(fd.readlink())).startswith("socket:"):
                    inodes.add(link.split("[")[1][:-1])
        own = [line.split() for line in listening.splitlines()[1:] if line.split()[9] in inodes]
        ports = {int(fields[1].partition(":")[2], 16) for fields in own if fields[3] == "0A"}
        assert ports == {config.metrics.port}
        with socket.create_connection(("127.0.0.1", config.metrics.port), timeout=60):
            pass
