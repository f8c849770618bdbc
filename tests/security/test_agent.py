"""The agent over mutual TLS: who gets in, what is refused, and what never leaves it."""

import signal
import uuid
from collections.abc import Generator
from pathlib import Path

import grpc
import pytest
from agent_process import AgentProcess, agent_process, served_seqs
from certificates import certificate
from own_ports import own_port
from service_process import at_agent, configured, ended, sloguard, started

from sidecar.config.schema import ConfigError, load_config
from sidecar.engine.agent_client import AgentClient, AgentLost, AgentRefused
from sidecar.record.journal import Journal
from vllm_sloguard.agent.engine_spec import EngineRole, EngineSpec
from vllm_sloguard.agent.listen import TlsFiles
from vllm_sloguard.wire import agent_pb2 as pb
from vllm_sloguard.wire.agent_pb2_grpc import AgentServiceStub

KEY = "an-api-key-that-stays"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name, signer in (("ca", ""), ("other-ca", ""), ("agent", "ca"), ("client", "ca"), ("stranger", "other-ca")):
        certificate(folder, name, signer)
    return folder


@pytest.fixture(scope="module")
def address() -> str:
    return f"127.0.0.1:{own_port()}"


@pytest.fixture(scope="module")
def agent(keys: Path, address: str, tmp_path_factory: pytest.TempPathFactory) -> Generator[AgentProcess]:
    tls = ("--certificate", f"{keys}/agent.pem", "--key", f"{keys}/agent.key", "--ca", f"{keys}/ca.pem")
    with agent_process(tmp_path_factory.mktemp("agent"), "--listen", address, *tls, VLLM_API_KEY=KEY) as process:
        yield process


def tls_of(keys: Path, name: str = "client", ca: str = "ca") -> TlsFiles:
    return TlsFiles(keys / f"{name}.pem", keys / f"{name}.key", keys / f"{ca}.pem")


@pytest.fixture
def client(agent: AgentProcess, keys: Path, address: str) -> Generator[AgentClient]:
    opened = AgentClient(address, tls_of(keys), "journal", print, patience_s=5)
    yield opened
    opened.close()


def spec(model: str = "fake", host: str = "127.0.0.1", **args: bool | float | str) -> EngineSpec:
    return EngineSpec(model, {"max_num_seqs": 8, **args}, host, 0, EngineRole.TRIAL)


def test_a_window_over_mutual_tls(agent: AgentProcess, keys: Path, address: str, tmp_path: Path) -> None:
    files = {name: str(path) for name, path in vars(tls_of(keys)).items()}
    config_file = at_agent(configured(tmp_path, budget=1), address, agent_tls=files)
    serve = started(config_file)
    asked = sloguard("retune", "--now", "--wait", "-c", config_file)
    assert asked.returncode == 0, asked.stderr
    config = load_config(config_file)
    [trial] = Journal(config.state, read_only=True).trials()
    assert (trial.status, served_seqs(config.engine.port)) == ("feasible", 2)
    ended(serve, signal.SIGTERM)


@pytest.mark.parametrize(("name", "ca"), [("stranger", "ca"), ("client", "other-ca")])
def test_certificates_are_checked_on_both_sides(
    agent: AgentProcess, keys: Path, address: str, name: str, ca: str
) -> None:
    with pytest.raises(AgentLost):
        AgentClient(address, tls_of(keys, name, ca), "journal", print, patience_s=0.5).facts()


def test_a_client_without_tls_is_refused(agent: AgentProcess, address: str) -> None:
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
        AgentServiceStub(channel).Describe(pb.DescribeRequest(), timeout=5)


def test_tcp_without_tls_and_an_open_key_are_refused(keys: Path, address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="an address over TCP needs agent_tls"):
        load_config(at_agent(configured(tmp_path), address))
    certificate(tmp_path, "open")
    (tmp_path / "open.key").chmod(0o644)
    files = TlsFiles(tmp_path / "open.pem", tmp_path / "open.key", keys / "ca.pem")
    with pytest.raises(ValueError, match=r"^engine\.agent_tls\.key: \S+open\.key is accessible to others"):
        AgentClient(address, files, "journal", print)


def test_a_missing_file_for_tls_is_named_once(keys: Path, address: str, tmp_path: Path) -> None:
    files = {name: str(path) for name, path in vars(tls_of(keys)).items()} | {"ca": str(tmp_path / "none.pem")}
    refused = sloguard("serve", "-c", at_agent(configured(tmp_path), address, agent_tls=files))
    assert refused.returncode == 2
    assert refused.stderr == f"sloguard: engine.agent_tls.ca: {tmp_path}/none.pem: No such file or directory\n"


def test_a_bad_address_of_an_agent_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r": engine\.agents\.0: 'nope': unix:///a/path or host:port is needed"):
        load_config(at_agent(configured(tmp_path), "nope"))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (spec(middleware="a.b"), "middleware: not an allowed argument"),
        (spec(trust_remote_code=True), "trust_remote_code: not an allowed argument"),
        (spec(kv_cache_dtype="--trust-remote-code"), "is not a value"),
        (spec(host="0.0.0.0"), "host: '0.0.0.0' is not allowed"),  # noqa: S104 - an address to refuse
        (spec(model="--config"), "model: '--config' is not allowed"),
    ],
)
def test_arguments_that_are_not_allowed_start_nothing(
    client: AgentClient, agent: AgentProcess, wrong: EngineSpec, error: str
) -> None:
    client.act_for(10)
    before = agent.engine_ids()
    with pytest.raises(AgentRefused, match=error):
        client.start(uuid.uuid4().hex[:12], wrong, fork=False, learned=b"")
    assert agent.engine_ids() == before


def test_loads_with_files_and_other_paths_of_the_engine_are_refused(client: AgentClient) -> None:
    client.act_for(11)
    engine = uuid.uuid4().hex[:12]
    for one in client.facts().engines:
        client.stop(one.engine_id, drain=False)
    client.start(engine, spec(), fork=False, learned=b"")
    load_client = client.call(lambda stub: stub.PrepareLoads, pb.PrepareLoadsRequest(controller=client.controller))
    request = pb.SendToLoadClientRequest(controller=client.controller, request_id="a", client_id=load_client.client_id)
    request.run.engine_id = engine
    request.run.argv.extend(["--dataset-path", "/etc/passwd"])
    with pytest.raises(AgentRefused, match="Unix socket only"):
        client.call(lambda stub: stub.SendToLoadClient, request)
    assert "not allowed" in client.ask(engine, "/docs", b"", 1.0).unanswered
    client.stop(engine, drain=False)


def test_the_environment_never_leaves_the_agent(client: AgentClient) -> None:
    described = client.call(lambda stub: stub.Describe, pb.DescribeRequest())
    assert KEY not in str(described)


def test_large_messages_are_refused(client: AgentClient) -> None:
    client.act_for(12)
    with pytest.raises((AgentRefused, AgentLost)):
        client.start(uuid.uuid4().hex[:12], spec(), fork=False, learned=b"0" * (5 * 2**20))
    assert client.facts().agent_id
