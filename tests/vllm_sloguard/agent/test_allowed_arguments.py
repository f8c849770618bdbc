"""What a controller may set."""

from typing import Any

import pytest

from vllm_sloguard.agent.allowed_arguments import AllowList, NotAllowedError, check_bench_argv
from vllm_sloguard.agent.serve_command import Args
from vllm_sloguard.knobs import KNOBS


def test_knobs_are_allowed_and_nothing_else() -> None:
    allowed = AllowList()
    allowed.check("m", "127.0.0.1", dict.fromkeys(KNOBS, 1))
    with pytest.raises(NotAllowedError, match="middleware: not an allowed argument"):
        allowed.check("m", "127.0.0.1", {"middleware": "os.system"})


@pytest.mark.parametrize("name", ["trust_remote_code", "middleware", "api_key", "port", "model", "plugins"])
def test_dangerous_arguments_need_the_operator(name: str) -> None:
    with pytest.raises(NotAllowedError):
        AllowList().check("m", "127.0.0.1", {name: True})


def test_the_operator_may_allow_more_but_not_what_the_agent_sets() -> None:
    AllowList(frozenset({"enable_lora"})).check("m", "127.0.0.1", {"enable_lora": True})
    with pytest.raises(NotAllowedError, match="set by the agent"):
        AllowList(frozenset({"port"})).check("m", "127.0.0.1", {"port": 1})


def test_arguments_of_the_agents_own_command_line_keep_their_values() -> None:
    allowed = AllowList(command_args={"trust_remote_code": True}, models=frozenset({"m"}))
    allowed.check("m", "127.0.0.1", {"trust_remote_code": True})
    with pytest.raises(NotAllowedError):
        allowed.check("m", "127.0.0.1", {"trust_remote_code": False})
    with pytest.raises(NotAllowedError, match="model: 'other' is not allowed; allowed: m"):
        allowed.check("other", "127.0.0.1", {})


@pytest.mark.parametrize("args", [{"kv_cache_dtype": "--middleware"}, {"block_size": ["1", "--x"]}])
def test_a_value_is_never_a_flag(args: dict[str, Any]) -> None:
    with pytest.raises(NotAllowedError, match="is not a value"):
        AllowList().check("m", "127.0.0.1", args)


def test_models_and_hosts() -> None:
    with pytest.raises(NotAllowedError, match="model"):
        AllowList().check("--config", "127.0.0.1", {})
    with pytest.raises(NotAllowedError, match=r"host: '0\.0\.0\.0' is not allowed; allowed: 127\.0\.0\.1"):
        AllowList().check("m", "0.0.0.0", {})  # noqa: S104 - an address to refuse


def test_a_load_has_only_the_flags_of_the_load_client() -> None:
    check_bench_argv(("--num-prompts", "5", "--ignore-eos"), files=False)
    for argv in (("--base-url", "http://elsewhere"), ("--result-dir", "/"), ("--seed=5",)):
        with pytest.raises(NotAllowedError):
            check_bench_argv(argv, files=True)
    check_bench_argv(("--dataset-path", "a"), files=True)
    with pytest.raises(NotAllowedError, match="Unix socket only"):
        check_bench_argv(("--dataset-path", "a"), files=False)


def test_the_load_clients_own_flags_are_allowed() -> None:
    from sidecar.config.schema import Workload
    from sidecar.measure.load_client import benchmark_argv

    argv = benchmark_argv(Workload(rate=1.0), "http://x", "m", "t")
    check_bench_argv(tuple(argv[argv.index("--dataset-name") :]), files=False)


def test_arguments_are_plain_values() -> None:
    args: Args = {"max_num_seqs": 4}
    AllowList(hosts=frozenset({""})).check("m", "", args)


def test_an_argument_of_the_command_line_may_be_spelled_as_other_json() -> None:
    allowed = AllowList(command_args={"hf_overrides": '{"a": 1,"b":[2]}'})
    allowed.check("m", "127.0.0.1", {"hf_overrides": '{"b": [2], "a": 1}'})
    with pytest.raises(NotAllowedError, match="hf_overrides"):
        allowed.check("m", "127.0.0.1", {"hf_overrides": '{"b": [2], "a": 2}'})
    with pytest.raises(NotAllowedError, match="hf_overrides"):
        allowed.check("m", "127.0.0.1", {"hf_overrides": "{"})
