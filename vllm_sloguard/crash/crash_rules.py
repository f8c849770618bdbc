"""Known kinds of crash: what each means and what to change, with a value if the text states one.

The first rule that matches wins. Each has an example, which docs/crashes.md shows and the tests classify.
"""

# ruff: noqa: E501 - the logs' own lines

import re
from collections.abc import Callable
from dataclasses import dataclass

from vllm_sloguard.crash import texts
from vllm_sloguard.crash.kinds import Category

_Change = str | Callable[[re.Match[str]], str]


@dataclass(frozen=True)
class CrashAdvice:
    """``anchor`` is the heading's in docs/crashes.md."""

    title: str
    anchor: str
    meaning: str
    changes: tuple[str, ...]


@dataclass(frozen=True)
class CrashRule:
    """One kind of crash. A change given as a function takes its value from the evidence."""

    title: str
    category: Category
    pattern: re.Pattern[str]
    example: str
    meaning: str
    changes: tuple[_Change, ...]

    @property
    def anchor(self) -> str:
        """The heading as a Markdown viewer links to it."""
        return re.sub(r"[^\w -]", "", self.title.lower()).replace(" ", "-")

    def advice(self, evidence: str) -> CrashAdvice | None:
        """None if the evidence does not match."""
        match = self.pattern.search(evidence)
        if match is None:
            return None
        changes = tuple(change if isinstance(change, str) else change(match) for change in self.changes)
        return CrashAdvice(self.title, self.anchor, self.meaning, tuple(text for text in changes if text))


def _share_below(match: re.Match[str]) -> str:
    free, total = float(match[1]), float(match[2])
    share = int(free / total * 100) / 100
    if share <= 0:
        return "free the GPU's memory first: hardly any of it is free"
    return f"gpu_memory_utilization: at most {share:.2f} ({free:g} of {total:g} GiB were free)"


def _divisor(match: re.Match[str]) -> str:
    heads, asked = int(match[1]), int(match[2])
    fits = next((n for n in range(min(asked, heads), 0, -1) if heads % n == 0), 1)
    return f"tensor_parallel_size: {fits}, or another divisor of {heads}"


def _value(knob: str, group: int = 1, words: str = "at most ", unit: str = "") -> _Change:
    return lambda match: f"{knob}: {words}{match[group]}{unit}" if match[group] else ""


_OOM, _CUDA, _START, _TIMEOUT, _DEATH = (
    Category.OUT_OF_MEMORY,
    Category.CUDA_ERROR,
    Category.STARTUP_FAILURE,
    Category.TIMEOUT,
    Category.ENGINE_DEATH,
)

CRASH_RULES: tuple[CrashRule, ...] = (
    CrashRule(
        "KV cache too small for one request",
        _OOM,
        re.compile(
            r"(?:KV cache is needed|max seq(?:uence)?[ _]len|Cannot auto-fit max_model_len).*?"
            r"(?:model length is (\d+)|stored in KV cache \((\d+)\)|$)"
        ),
        "ValueError: To serve at least one request with the model's max seq len (4096), (0.02 GiB KV cache is needed, which"
        " is larger than the available KV cache memory (0.01 GiB). Based on the available memory, the estimated maximum"
        " model length is 1792.",
        "What is left for the KV cache after weights and activations holds less than one request of max_model_len tokens.",
        (
            _value("max_model_len", 1),
            _value("max_model_len", 2),
            "or raise gpu_memory_utilization, lower max_num_batched_tokens, or use kv_cache_dtype: fp8",
        ),
    ),
    CrashRule(
        "No memory left for the KV cache",
        _OOM,
        re.compile(r"No available memory for the cache blocks"),
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
        "Weights and activations take the whole share of the GPU that gpu_memory_utilization allows.",
        (
            "raise gpu_memory_utilization, or lower max_num_batched_tokens and max_num_seqs",
            "or spread the weights: a higher tensor_parallel_size, a quantized model",
        ),
    ),
    CrashRule(
        "GPU memory taken by others",
        _OOM,
        re.compile(r"Free memory on device[^(]*\(([\d.]+)/([\d.]+) ?GiB\)"),
        "ValueError: Free memory on device cuda:0 (38.69/139.8 GiB) on startup is less than desired GPU memory utilization"
        " (0.95, 132.81 GiB).",
        "Another process holds memory of this GPU, or the previous engine is not gone yet.",
        (_share_below, "or end the other process: `nvidia-smi` and `sloguard doctor` name it"),
    ),
    CrashRule(
        "Host memory too small for the KV cache",
        _OOM,
        re.compile(r"Available memory on node \d+ \(([\d.]+)/([\d.]+) GiB\)"),
        "ValueError: Available memory on node 0 (19.99/21.96 GiB) on kv cache allocation is less than requested memory for"
        " kv (64.0 GiB).",
        "The CPU build reserves its KV cache in host memory, and there is not that much.",
        (_value("kv_cache_memory_bytes (or VLLM_CPU_KVCACHE_SPACE)", 1, "below ", " GiB"),),
    ),
    CrashRule(
        "Shared memory too small",
        _OOM,
        re.compile(r"/dev/shm|shared memory"),  # noqa: S108 - a text
        "Error while creating shared memory segment /dev/shm/nccl-Gb5uHx (size 33030528), error: No space left on device (28)",
        "The processes of one engine talk through /dev/shm, and a container's default of 64 MiB is too small.",
        ("start the container with --ipc=host or --shm-size=16g; in Kubernetes, mount an emptyDir of medium Memory",),
    ),
    CrashRule(
        "Host memory ran out",
        _OOM,
        re.compile(
            r"mmap|Cannot allocate memory|DefaultCPUAllocator|\bMemoryError|bad_alloc|137\b|OOMKilled|oom-kill|Killed|swap space"
            r"|memory pressure|running low on memory|Unable to allocate"
        ),
        "RuntimeError: unable to mmap 16933256392 bytes from file <model.safetensors>: Cannot allocate memory (12)",
        "The host's memory, or the container's limit, did not suffice: the kernel refused memory or killed a process.",
        (
            "give the container or the host more memory; `dmesg` names the process that was killed",
            "lower swap_space and cpu_offload_gb; load fewer shards at once (max_parallel_loading_workers: 1)",
        ),
    ),
    CrashRule(
        "GPU memory ran out",
        _OOM,
        re.compile(
            r"(?i)out of memory|OutOfMemory|ALLOC_FAILED|OUT_OF_(?:DEVICE|HOST)_MEMORY|RESOURCE_EXHAUSTED|memory profiling|not enough GPU memory|nrt_tensor_allocate|Failed to alloc"
        ),
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB.",
        "An allocation on the GPU failed: while the model was loaded, at the profile run, or under load.",
        (
            "while starting: a higher tensor_parallel_size, a quantized model, or lower max_num_batched_tokens and max_num_seqs",
            "under load: lower gpu_memory_utilization by 0.05, which leaves more outside the KV cache",
            "`sloguard budget --model DIR` shows where the memory goes",
        ),
    ),
    CrashRule(
        "No usable driver",
        _CUDA,
        re.compile(r"driver|NVML|libcuda|GetDeviceCount|GPUs are available|forward compatibility"),
        "RuntimeError: The NVIDIA driver on your system is too old (found version 12080).",
        "vLLM's CUDA or ROCm does not find a driver, or finds one older than it needs.",
        (
            "check `nvidia-smi` inside the container, and that it was started with --gpus all",
            "update the driver, or use a build of vLLM for the installed one",
        ),
    ),
    CrashRule(
        "NCCL failed",
        _CUDA,
        re.compile(r"NCCL|nccl"),
        "RuntimeError: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)",
        "The GPUs of one engine could not talk to each other.",
        (
            "run once with NCCL_DEBUG=INFO: the line before the error says which call failed",
            "common remedies: --ipc=host, NCCL_P2P_DISABLE=1, NCCL_SOCKET_IFNAME set to the right interface",
        ),
    ),
    CrashRule(
        "No kernel for this GPU",
        _CUDA,
        re.compile(r"no kernel image|invalid device function|device kernel image is invalid"),
        "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device",
        "This build of vLLM or of a library was not compiled for the GPU's compute capability.",
        ("use a build for this GPU, or another attention backend or quantization",),
    ),
    CrashRule(
        "A kernel failed",
        _CUDA,
        re.compile(
            r"illegal memory|device-side|Assertion|launch failure|illegal instruction|misaligned|Memory access fault"
        ),
        "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
        "A kernel read or wrote where it may not: mostly a defect of the kernel, sometimes faulty hardware.",
        (
            "look for `Xid` in `dmesg`: a number there is the driver's or the hardware's report",
            "run once with CUDA_LAUNCH_BLOCKING=1 to see which kernel; try enforce_eager: true or another attention backend",
            "where it follows one configuration, take that value out of search.knobs and report it to vLLM",
        ),
    ),
    CrashRule(
        "Heads not divisible by the tensor-parallel size",
        _START,
        re.compile(r"heads \((\d+)\) must be divisible by tensor parallel size \((\d+)\)"),
        "Value error, Total number of attention heads (64) must be divisible by tensor parallel size (3).",
        "Each rank takes the same number of attention heads.",
        (_divisor,),
    ),
    CrashRule(
        "More GPUs requested than present",
        _START,
        re.compile(
            r"World size \((\d+)\) is larger than the number of available GPUs \((\d+)\)|total number of available GPUs"
        ),
        "Value error, World size (2) is larger than the number of available GPUs (1) in this node.",
        "tensor_parallel_size times pipeline_parallel_size is more than the GPUs that vLLM sees.",
        (_value("tensor_parallel_size", 2), "or make more GPUs visible (CUDA_VISIBLE_DEVICES, --gpus all)"),
    ),
    CrashRule(
        "Fewer batched tokens than sequences",
        _START,
        re.compile(r"max_num_batched_tokens \(\d+\) must be greater than or equal to max_num_seqs \((\d+)\)"),
        "Value error, max_num_batched_tokens (8) must be greater than or equal to max_num_seqs (16).",
        "Each running sequence needs a token of the batch.",
        (_value("max_num_batched_tokens", words="at least "),),
    ),
    CrashRule(
        "Fewer batched tokens than max_model_len",
        _START,
        re.compile(r"max_num_batched_tokens \(\d+\) is smaller than max_model_len \((\d+)\)"),
        "Value error, max_num_batched_tokens (2048) is smaller than max_model_len (8192).",
        "Without chunked prefill, a whole prompt must fit into one batch.",
        (_value("max_num_batched_tokens", words="at least "), "or enable_chunked_prefill: true"),
    ),
    CrashRule(
        "max_model_len above the model's",
        _START,
        re.compile(r"max_model_len \(\d+\) is greater than the derived max_model_len \((?:\w+=)?(\d+)"),
        "Value error, User-specified max_model_len (8192) is greater than the derived max_model_len (2048).",
        "The model was trained for shorter contexts.",
        (_value("max_model_len"),),
    ),
    CrashRule(
        "Port in use",
        _START,
        re.compile(r"(?i)address already in use|attempting to bind on address \('[^']*', (\d+)\)|EADDRINUSE"),
        "OSError: [Errno 98] Address already in use",
        "Another process listens on the port; often the engine before this one.",
        ("another --port, or end the process that listens: `ss -ltnp`",),
    ),
    CrashRule(
        "Unknown argument",
        _START,
        re.compile(r": error: (?:unrecognized arguments: (\S+)|argument (\S+?):)"),
        "vllm: error: unrecognized arguments: --max-num-seq-typo",
        "This version of vLLM has no such argument, or does not accept its value.",
        (_value("remove or correct", 1, ""), _value("correct", 2, ""), "`vllm serve --help=all` lists every argument"),
    ),
    CrashRule(
        "CUDA initialised before a fork",
        _START,
        re.compile(r"Cannot re-initialize CUDA"),
        "RuntimeError: Cannot re-initialize CUDA in forked subprocess.",
        "Something used CUDA in the parent process before vLLM forked its workers.",
        ("set VLLM_WORKER_MULTIPROC_METHOD=spawn",),
    ),
    CrashRule(
        "Model not available",
        _START,
        re.compile(
            r"Repo id must be|gated|GatedRepo|RepositoryNotFound|LocalEntryNotFound|couldn't connect|Cannot find any model weights|401 Client|404 Client|no file named|name resolution"
        ),
        "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name': '/nonexistent/model'.",
        "The model is not in that folder, or can't be downloaded.",
        ("check the path as the container sees it; for a gated model, set HF_TOKEN; offline, set HF_HUB_OFFLINE=1",),
    ),
    CrashRule(
        "Model not supported",
        _START,
        re.compile(
            r"model architecture|not supported for now|does not recognize this architecture|Unrecognized model|trust_remote_code|model type"
        ),
        "ValueError: Model architectures ['FooForCausalLM'] are not supported for now.",
        "This version of vLLM or of transformers does not know the model, or could not import its class.",
        ("update vLLM and transformers; a model with its own code needs trust_remote_code: true",),
    ),
    CrashRule(
        "GPUs waiting for each other",
        _TIMEOUT,
        re.compile(r"Watchdog|watchdog|Heartbeat|WorkNCCL|waiting for clients|socket has timed out|ms for"),
        "[Rank 2] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=2, OpType=ALLREDUCE, Timeout(ms)=600000)",
        "One rank did not come to a collective operation; the others waited until the watchdog ended them.",
        (
            "look at the rank that is not named: its last lines say where it stopped",
            "try disable_custom_all_reduce: true, NCCL_P2P_DISABLE=1; over several nodes, check NCCL_SOCKET_IFNAME",
        ),
    ),
    CrashRule(
        "Engine processes slow to start",
        _TIMEOUT,
        re.compile(r"Timed out waiting for engine"),
        "TimeoutError: Timed out waiting for engine core processes to start.",
        "The API server gave up before the engine had loaded and compiled the model.",
        (
            "VLLM_ENGINE_READY_TIMEOUT_S: higher than the 600 s that is the default; slow storage and a first compilation need it",
            "a process that printed nothing for long hangs: the last line of each process says where",
        ),
    ),
    CrashRule(
        "A worker that does not answer",
        _TIMEOUT,
        re.compile(r"RPC call to (\w+) timed out|^TimeoutError$|heartbeat|MQLLMEngine|iteration timed out"),
        "TimeoutError: RPC call to execute_model timed out.",
        "A worker did not finish a step in time: it hangs, or it died without a word.",
        (
            "look for the worker's own last lines, and for `Xid` in `dmesg`",
            "a step that is only slow needs VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS (V1) or VLLM_RPC_TIMEOUT (V0) raised",
        ),
    ),
    CrashRule(
        "Segmentation fault",
        _DEATH,
        re.compile(r"SIGSEGV|SIGILL|SIGFPE|Segmentation|Segfault|core dumped|free\(\)|malloc\(\)|double free"),
        "Fatal Python error: Segmentation fault",
        "Native code crashed: a library that does not fit this machine, or a defect.",
        ("the stack after this line names the library; update it, or try another attention backend",),
    ),
    CrashRule(
        "Bus error",
        _DEATH,
        re.compile(r"SIGBUS|Bus error"),
        "*** SIGBUS received at time=1692322557 on cpu 3 ***",
        "A mapped page could not be provided: often /dev/shm is full, sometimes a file that was truncated.",
        ("start the container with --ipc=host or --shm-size=16g",),
    ),
    CrashRule(
        "Stopped from outside",
        _DEATH,
        texts.STOPS,
        "[shutdown] EngineCore: trigger received signal=SIGTERM",
        "The engine was told to stop: by its supervisor, a batch scheduler or an operator. It did not crash.",
        ("look in the supervisor's log (systemd, Kubernetes events, Slurm) for who stopped it and why",),
    ),
    CrashRule(
        "Start interrupted",
        _START,
        texts.STOPS,
        "KeyboardInterrupt: terminated",
        "The engine was told to stop before it was ready: often a supervisor's or a scheduler's time limit.",
        ("give the start more time: the startup probe, TimeoutStartSec of systemd, the job's time limit",),
    ),
    CrashRule(
        "Killed",
        _DEATH,
        re.compile(r"SIGKILL|exit code: -9|: -9\}"),
        "exit code -9, SIGKILL, often the kernel's when memory runs out; nothing in the log says why",
        "The process was killed from outside, often by the kernel for its memory.",
        ('`dmesg` has "Out of memory: Killed process"; a container\'s limit shows in its memory.events',),
    ),
)
