"""Starts engines by forking a process that has already imported vLLM, as imports dominate an ordinary start.

``python -m vllm_sloguard.starts.fork_server FOLDER`` exchanges the messages of vllm_sloguard.starts.fork_protocol over
the socket that is its standard input. When that is closed, it kills the engines that were not detached, and exits.

FOLDER has lists of the modules that running engines have imported (vllm_sloguard.starts.import_list), by version of
vLLM. They are reread before each fork, so the second engine starts with what the first one needed. The server refuses
to fork if it has more than one thread (except the one left by NVIDIA's NVML, which importing vLLM initializes), if CUDA
has been initialized, or if this version of vLLM is untested.
"""

import ctypes
import gc
import importlib
import io
import os
import re
import runpy
import selectors
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.context import ForkContext, ForkProcess
from pathlib import Path
from typing import Any

from vllm_sloguard.starts import import_list
from vllm_sloguard.starts.fork_protocol import (
    Answer,
    Detached,
    DetachRequest,
    Exited,
    ForkedEngine,
    ForkRequest,
    ServerReady,
    ServerUsage,
    Unusable,
    decode_request,
    encode_message,
)

# Imported before any import list exists; modules that this vLLM lacks are skipped.
_FIRST = (
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.serve",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.engine.coordinator",
    "vllm.v1.executor.multiproc_executor",
)
_LONGEST_LINE = 2**20
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


# First and last version of vLLM that forked engines were tested with.
_VERSIONS = ((0, 26), (0, 32))
# The driver's poll thread, which remains after nvmlShutdown. CUDA works in forked processes all the same, if it was not
# initialized before.
_NVML_THREAD = re.compile(r"cuda[0-9a-f]{11}")
_CUDA_ERROR_NOT_INITIALIZED = 3
_attempted: set[str] = set()
_CLAIMED_CORES = "vllm-sloguard/core"  # the abstract sockets by which engines of a host find each other
_claims: list[socket.socket] = []


class UnusableError(RuntimeError):
    """This process must not fork; the message says why."""


def main() -> int:
    """Serves until the input is closed; in a forked process, runs the engine and returns its exit code."""
    folder = Path(sys.argv[1])
    # Importing numpy would start the threads of its BLAS library, which engines do not need.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    # The same for the background thread of pyarrow's allocator; pandas imports pyarrow if it is installed.
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    with socket.socket(fileno=os.dup(0)) as channel:
        try:
            began = time.monotonic()
            version = _import(folder)
        except UnusableError as error:
            _send(channel, Unusable(str(error)))
            return 0
        _send(channel, ServerReady(version, time.monotonic() - began, usage()))
        request = _serve(channel, folder)
    return 0 if request is None else _run(request)


def _serve(channel: socket.socket, folder: Path) -> ForkRequest | None:
    """Answers requests until the input is closed; in a forked process, returns the request to run."""
    engines: set[int] = set()
    ended, wake = socket.socketpair()
    with ended, wake, selectors.DefaultSelector() as ready, channel.makefile("rb", buffering=0) as lines:
        for end in (ended, wake):
            end.setblocking(False)
        _adopt_orphans()
        signal.set_wakeup_fd(wake.fileno())
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        ready.register(channel, selectors.EVENT_READ)
        ready.register(ended, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is ended:
                    ended.recv(4096)
                    _reap(channel, engines)
                    continue
                if not (line := _line(lines)):
                    _kill(engines)
                    return None
                request = decode_request(line)
                if isinstance(request, DetachRequest):
                    engines.discard(request.pid)
                    _send(channel, Detached(request.pid))
                    continue
                try:
                    _import(folder)
                except UnusableError as error:
                    _send(channel, Unusable(str(error)))
                    continue
                if (pid := os.fork()) == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    return request
                engines.add(pid)
                _send(channel, ForkedEngine(pid, usage()))


def _line(lines: io.RawIOBase) -> bytes:
    """The next request; empty at the end of the input, even if the sidecar was killed in mid-line."""
    try:
        line = lines.readline(_LONGEST_LINE)
    except ConnectionResetError:
        return b""
    return line if line.endswith(b"\n") else b""


def _adopt_orphans() -> None:
    """Makes this process the subreaper of its engines' orphans."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap(channel: socket.socket, engines: set[int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in engines:
            engines.remove(pid)
            _send(channel, Exited(pid, os.waitstatus_to_exitcode(status)))


def _send(channel: socket.socket, answer: Answer) -> None:
    # If the sidecar is gone, the input is about to be closed.
    with suppress(OSError):
        channel.sendall(encode_message(answer))


def _kill(engines: set[int]) -> None:
    for pid in engines:
        for kill in (os.killpg, os.kill):  # just forked, not yet a group leader
            with suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)


def usage() -> ServerUsage:
    """The current resource use of this process."""
    me = Path("/proc/self")
    return ServerUsage(
        descriptors=sum(1 for _ in (me / "fd").iterdir()),
        threads=sum(1 for _ in (me / "task").iterdir()),
        resident_bytes=int((me / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
    )


def _import(folder: Path) -> str:
    """Imports missing modules that engines need, and returns vLLM's version. Raises UnusableError."""
    before = len(_attempted)
    _attempt("vllm")
    version = str(getattr(sys.modules.get("vllm"), "__version__", "none"))
    if not _VERSIONS[0] <= tuple(int(n) for n in re.findall(r"\d+", version)[:2]) <= _VERSIONS[1]:
        raise UnusableError(f"it was tested with vLLM 0.26 to 0.32, this is {version}")
    for name in (*_FIRST, *import_list.read_imports(import_list.list_path(folder, version))):
        if name not in _attempted and not _attempt(name):
            import_list.exclude(import_list.list_path(folder, version), name)
            raise UnusableError(f"importing {name} left a thread running")
    torch: Any = sys.modules.get("torch")
    if (torch is not None and torch.cuda.is_initialized()) or _driver_is_initialised():
        raise UnusableError("an import has initialised CUDA")
    if len(_attempted) > before:
        _fork_engines()
        # Existing objects are exempt from garbage collection, so that forked processes share their pages.
        gc.collect()
        gc.freeze()
    return version


def _attempt(name: str) -> bool:
    """Imports ``name``; returns whether this process still has a single thread."""
    _attempted.add(name)
    with suppress(Exception):  # it will fail in the engine too, which reports it
        importlib.import_module(name)
    return _threads_of_imports() == 1


def _threads_of_imports() -> int:
    """The number of threads of this process, not counting NVML's."""
    names: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # the thread has ended meanwhile
            names.append((task / "comm").read_text().rstrip("\n"))
    return sum(1 for name in names if not _NVML_THREAD.fullmatch(name))


def _driver_is_initialised() -> bool:
    """Whether cuInit was called, possibly without torch's knowledge."""
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:  # the CUDA driver is not loaded
        return False
    return driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _CUDA_ERROR_NOT_INITIALIZED


def _fork_engines() -> None:
    """Makes vLLM fork an engine's further processes instead of spawning them, which would repeat the imports."""
    system: Any = importlib.import_module("vllm.utils.system_utils")
    original = system.get_mp_context
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and getattr(module, "get_mp_context", None) is original:
            module.get_mp_context = _forking  # pyright: ignore[reportAttributeAccessIssue]


def _forking() -> Any:
    return _Forking()


class _Process(ForkProcess):
    """An engine process with the OpenMP threads that it would have if it had been spawned."""

    def run(self) -> None:
        _bind_threads()
        super().run()


class _Forking(ForkContext):
    Process = _Process


def _bind_threads() -> None:
    """Applies environment variables that OpenMP reads only when loaded; vLLM sets them for each process.

    vLLM picks the same cores for every engine of a host. Two engines bound to them would starve each other while other
    cores are idle, so only the first is bound, and the kernel finds cores for the others.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or not (count := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():
        return
    torch.set_num_threads(int(count))
    places = os.environ.get("GOMP_CPU_AFFINITY") or os.environ.get("OMP_PLACES", "")
    if re.fullmatch(r"[\d ,{}]+", places):  # a list of cores, as vLLM writes it
        cores = {int(core) for core in re.findall(r"\d+", places)}
        if _claim(cores):
            os.sched_setaffinity(0, cores)
        else:
            print(f"sloguard: not bound to cores {places}: another engine is bound to one of them", file=sys.stderr)


def _claim(cores: Iterable[int]) -> bool:
    """Claims ``cores`` for the life of this process; claims none where another forked engine has one of them.

    A claim is a bound socket in the abstract namespace, which the kernel frees however the process ends.
    """
    claims: list[socket.socket] = []
    for core in cores:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        claims.append(claim)
        try:
            claim.bind(f"\0{_CLAIMED_CORES}/{core}")
        except OSError:
            for made in claims:
                made.close()
            return False
    _claims.extend(claims)
    return True


def _run(request: ForkRequest) -> int:
    """In the forked process: sets it up like an ordinary start of the command, and runs it."""
    os.setsid()
    os.chdir(request.folder)
    log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(null)
    os.environ.clear()
    os.environ.update(request.env)
    sys.argv = [request.module, *request.argv]
    # runpy warns that the module is already imported, which is intended.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
    try:
        runpy.run_module(request.module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - the boundary of the forked process: as the interpreter would
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
