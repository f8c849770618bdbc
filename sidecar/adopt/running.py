"""Reads how a running vLLM was started, from /proc."""

from pathlib import Path

from sidecar.adopt.launch import NotReadable, Started

# Of a running process only what vLLM and its libraries read; the rest is the shell's.
_PREFIXES = (
    "VLLM_",
    "HF_",
    "HUGGING",
    "CUDA_",
    "NCCL_",
    "TORCH",
    "PYTORCH_",
    "TRITON_",
    "TRANSFORMERS_",
    "OMP_",
    "RAY_",
)


def from_process(pid: int, proc: Path = Path("/proc")) -> Started:
    """The command of the process ``pid``. Raises NotReadable."""
    folder = proc / str(pid)
    try:
        words = (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        variables = (folder / "environ").read_bytes().split(b"\0")
        at = (folder / "cwd").readlink()
    except OSError as error:
        raise NotReadable(f"process {pid}: {error.strerror}; run it as root or as the process's own user") from None
    pairs = (variable.decode(errors="replace").partition("=") for variable in variables)
    environment: dict[str, str | None] = {name: value for name, _, value in pairs if name.startswith(_PREFIXES)}
    # Words of a process are not expanded again.
    line = tuple(word.decode(errors="replace").replace("$", "$$") for word in words)
    return Started(line, environment, notes=(f"relative paths are relative to {at}",))
