"""The command line of ``sloguard-agent``."""

import argparse
import difflib
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_sloguard import __version__
from vllm_sloguard.agent.agent import AgentSetup
from vllm_sloguard.agent.allowed_arguments import AllowList
from vllm_sloguard.agent.command_flags import UnreadableCommandError, read_command
from vllm_sloguard.agent.engine_spec import EngineRole, EngineSpec
from vllm_sloguard.agent.listen import AddressError, AgentAddress, TlsFiles, read_address
from vllm_sloguard.agent.state_file import AgentFolder
from vllm_sloguard.agent.vllm_arguments import arguments_of_vllm

_DESCRIPTION = (
    "Runs vLLM engines for a sidecar. After `--`, an existing command line: it is started at once with exactly these"
    " flags, and serves with or without a sidecar."
)


class OptionError(ValueError):
    """A bad command line; one line that names the option and the allowed values."""


@dataclass(frozen=True)
class AgentOptions:
    """Everything that the command line says."""

    setup: AgentSetup
    address: AgentAddress
    tls: TlsFiles | None


def read_options(argv: Sequence[str], environ: Mapping[str, str]) -> AgentOptions:
    """Raises OptionError; exits for --help and for what argparse refuses."""
    own, dashes, command = _split(list(argv))
    if dashes and not command:
        raise OptionError("--: a command line is needed after it, such as `vllm serve MODEL`")
    options = _parser().parse_args(own)
    folder = AgentFolder(Path(options.state).absolute() if options.state else default_folder(environ))
    address = _address(options.listen, folder)
    tls = _tls(options, address)
    service, untunable = _service(command)
    python = _python(options.python)
    names = _allowed_names(options.allow, "" if options.trust_names else python)
    allowed = AllowList(
        names,
        service.args if service is not None else None,
        frozenset({service.model}) if service is not None else frozenset(options.model),
        frozenset({"127.0.0.1", options.host, *([service.host] if service is not None else [])}),
    )
    setup = AgentSetup(
        python,
        folder,
        allowed,
        address.socket is not None,
        tuple(command),
        service,
        untunable,
        keep_kernels=not options.no_kernels,
    )
    return AgentOptions(setup, address, tls)


def _split(argv: list[str]) -> tuple[list[str], bool, list[str]]:
    if "--" not in argv:
        return argv, False, []
    at = argv.index("--")
    return argv[:at], True, argv[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sloguard-agent", description=_DESCRIPTION, usage="%(prog)s [options] [-- COMMAND]"
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--listen", default="", metavar="ADDRESS", help="unix:///path, or host:port with mutual TLS")
    parser.add_argument("--state", default="", metavar="FOLDER", help="logs, sockets and the state file")
    parser.add_argument("--certificate", type=Path, help="this agent's certificate, for TCP")
    parser.add_argument("--key", type=Path, help="its key, readable by its owner only")
    parser.add_argument("--ca", type=Path, help="the authority that signs the sidecar's certificate")
    parser.add_argument("--allow", default="", metavar="NAMES", help="arguments that a sidecar may set beside knobs")
    # For the sidecar's own agent: reading the names from vLLM's source takes a while, and the sidecar has checked them.
    parser.add_argument("--trust-names", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", action="append", default=[], help="a model that a sidecar may serve; default: any")
    parser.add_argument("--no-kernels", action="store_true", help="don't keep Triton's kernels in the state folder")
    parser.add_argument("--host", default="127.0.0.1", help="an address that a sidecar may have an engine listen on")
    parser.add_argument("--python", default=sys.executable, help="the Python of vLLM's environment")
    return parser


def default_folder(environ: Mapping[str, str]) -> Path:
    """/run/sloguard for root, else one in the user's runtime folder, or in the temporary one."""
    if os.geteuid() == 0 and os.access("/run", os.W_OK):
        return Path("/run/sloguard")
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "sloguard"
    return Path(tempfile.gettempdir()) / f"sloguard-agent-{os.geteuid()}"


def _address(text: str, folder: AgentFolder) -> AgentAddress:
    address = text or f"unix://{folder.path / 'agent.sock'}"
    try:
        return read_address(address)
    except AddressError as error:
        raise OptionError(f"--listen: {address!r}: {error}") from None


def _tls(options: argparse.Namespace, address: AgentAddress) -> TlsFiles | None:
    files = {name: getattr(options, name) for name in ("certificate", "key", "ca")}
    missing = [f"--{name}" for name, path in files.items() if path is None]
    if address.socket is not None:
        return None
    if missing:
        raise OptionError(f"--listen: {address.text} is TCP, which needs mutual TLS: {', '.join(missing)} is missing")
    return TlsFiles(files["certificate"], files["key"], files["ca"])


def _python(text: str) -> str:
    """The executable, which must exist; a name is looked up in PATH when it is used."""
    found = shutil.which(text)
    if found is None:
        raise OptionError(f"--python: {text!r}: the Python of vLLM's environment is needed, an executable file")
    # Engines are started in other folders.
    return str(Path(found).absolute())


def _allowed_names(text: str, python: str) -> frozenset[str]:
    """The names in ``text``, which must be arguments of the vLLM of ``python``; unchecked if that is empty."""
    names = frozenset(name.strip().replace("-", "_") for name in text.split(",") if name.strip())
    if bad := sorted(name for name in names if not name.isidentifier()):
        raise OptionError(f"--allow: {bad[0]!r} is not an argument of vLLM; names with commas between are needed")
    known = arguments_of_vllm(python) if names and python else frozenset[str]()
    unknown = sorted(names - known)
    if known and unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        meant = f"; did you mean {near[0]}?" if near else "; `vllm serve --help=all` lists them"
        raise OptionError(f"--allow: {unknown[0]!r} is not an argument of the vLLM of {python}{meant}")
    return names


def _service(command: list[str]) -> tuple[EngineSpec | None, str]:
    """What the service's command line means, and why it can't be tuned if that is unknown."""
    if not command:
        return None, ""
    try:
        line = read_command(command)
    except UnreadableCommandError as error:
        return EngineSpec("", {}, "", 0, EngineRole.SERVING, command=tuple(command)), str(error)
    return (
        EngineSpec(
            line.model,
            line.args,
            line.host,
            line.port,
            EngineRole.SERVING,
            line.drain_timeout_s,
            command=tuple(command),
        ),
        "",
    )
