"""What vLLM, PyTorch, Ray, NCCL and the kernel print when an engine exits, by meaning."""

import re

MEMORY_TEXTS = re.compile(
    r"Free memory on device .{0,80}on startup is less than"
    r"|Available memory on node .{0,120}is less than"
    r"|No available memory for the cache blocks"
    r"|To serve at least one request with the model.{0,12}max seq len"
    r"|KV cache is needed, which is larger than the available KV cache memory"
    r"|max seq(?:uence)?[ _]len.{0,60}larger than the maximum number of tokens that can be stored in KV cache"
    r"|Cannot auto-fit max_model_len"
    r"|Failed to load model - not enough GPU memory"
    r"|\bOutOfMemoryError\b"
    r"|(?i:\b(?:CUDA|HIP|XPU|NPU|MPS|SYCL|backend|hbm|device|GPU|host)\b[^.]{0,30}\bout of memory\b)"
    r"|(?i:Cuda failure \d* ?:? ?'?out of memory)"
    r"|(?i:\b(?:cuda|hip)Error(?:MemoryAllocation|OutOfMemory)\b)"
    r"|CUDA_ERROR_OUT_OF_MEMORY"
    r"|CU[A-Z]+_STATUS_ALLOC_FAILED"
    r"|(?:RESULT|PI)_ERROR_OUT_OF_(?:DEVICE_MEMORY|HOST_MEMORY|RESOURCES)"
    r"|PT_DEVMEM Allocation failed"
    r"|Ran out of memory in memory space|Failed to alloc(?:ate)? .{0,40}\bDEVICE\b|nrt_tensor_allocate status=4"
    r"|\[metal::malloc\]|kIOGPU\w*OutOfMemory"
    r"|RESOURCE_EXHAUSTED.{0,200}(?:[Oo]ut of memory|allocat)"
    r"|Error in memory profiling"
    r"|DefaultCPUAllocator: (?:can't allocate|not enough) memory"
    r"|Cannot allocate memory"
    r"|\bunable to mmap \d+ bytes"
    r"|unable to allocate shared memory"
    r"|Unable to allocate .{1,40} for an array"
    r"|(?:shared memory|/dev/shm).{0,160}No space left on device"
    r"|No space left on device.{0,160}(?:shared memory|/dev/shm)"
    r"|No space left on device: '/(?:psm|torch|mp)[_-]"
    r"|insufficient shared memory \(shm\)"
    r"|lack of CPU swap space"
    r"|Too large swap space"
    r"|^MemoryError\b"
    r"|\bstd::bad_alloc\b"
    r"|\bOOMKilled\b"
    r"|\boom-kill(?:er)?:|\boom[_-]kill event|exceeded (?:job|step) memory limit"
    r"|[Oo]ut of memory: Killed process"
    r"|has been killed by the OOM killer|Failed with result 'oom-kill'"
    r"|[1-9]\d* Workers \(tasks / actors\) killed due to memory pressure"
    r"|killed due to the node running low on memory"
)
START_TEXTS = re.compile(
    r"^(?!slurmstepd|srun)(?:[\w./-]{1,80}|vllm \w+|usage: .{0,60}): error: "
    r"|\d+ validation errors? for \w+$"
    r"|^(?:Value|Assertion) (?:error|failed), "
    r"|[Aa]ddress already in use|\bEADDRINUSE\b"
    r"|error while attempting to bind on address"
    r"|Error in inspecting model architecture"
    r"|Cannot re-initialize CUDA in forked subprocess"
    r"|\.(?:c|cc|cpp|cu|cuh|h|hip)(?::\d+){1,2}: (?:fatal )?error: "
    r"|\bld: cannot find -l"
    r"|\b(?:ptxas|nvcc|nvlink) (?:fatal|error)\s*:|\bnvrtc: error: "
    r"|\bsh: .{0,40}\b(?:nvcc|vllm|python3?|gcc|g\+\+|ninja|ptxas): (?:command )?not found"
    r"|Insufficient (?:nvidia|amd)\.com/gpu"
)
DEVICE_TEXTS = re.compile(
    r"(?i:(?<!unhandled )(?:CUDA|HIP) (?:runtime |driver |unknown )?error\b)"
    r"|(?i:Cuda failure \d* ?:? ?')"
    r"|CUDA kernel failed|== (?:cuda|hip)Success\b|DeferredCudaCallError|CUDA (?:driver )?initialization failed"
    r"|Triton Error \[(?:CUDA|HIP)\]"
    r"|\bCU(?:BLAS|DNN|SPARSE|SOLVER|FFT)(?:LT)?_STATUS_[A-Z]"
    r"|\b(?:HIPBLAS|rocblas|miopen)_?[Ss](?:TATUS|tatus)_?[A-Z]"
    r"|\b(?:cuda|hip)Error[A-Z]\w+"
    r"|\bCUDA_ERROR_[A-Z]"
    r"|\bHSA_STATUS_ERROR"
    r"|Failed to execute the model status=\d|\bNRT_[A-Z]{3,}|\bnrt_\w+ failed"
    r"|\bUR_RESULT_ERROR|\bZE_RESULT_ERROR"
    r"|Memory access fault by GPU"
    r"|device-side assert triggered|Device-side assertion .{0,200} failed"
    r"|illegal memory access was encountered"
    r"|no kernel image is available"
    r"|block: \[\d+,\d+,\d+\], thread: \[\d+,\d+,\d+\] Assertion"
    r"|Unexpected error from (?:cuda|hip)GetDeviceCount"
    r"|NVIDIA driver on your system is too old"
    r"|Found no NVIDIA driver"
    r"|No (?:CUDA|HIP) GPUs are available"
    r"|forward compatibility was attempted on non supported HW"
    r"|\bNVMLError_(?:LibraryNotFound|DriverNotLoaded|LibRmVersionMismatch|GpuIsLost|Unknown)"
    r"|libcuda\.so\.1: cannot open shared object"
    r"|\bXid \(PCI"
    r"|\bsynStatus=\d|FATAL ERROR :: MODULE:PT_|Native API failed|kIOGPUCommandBuffer"
    r"|\bPTA call acl api failed|\bE[A-Z]9999\b|\baclnn\w+ failed|\baclrt\w+ failed|ACL stream synchronize failed"
    r"|runtime result = 507\d\d\d|vector core exception"
    r"|NPU function error|\bACL error|aicore exception|\bDEVICE_LOST\b|^RuntimeError: UR error"
    r"|could not select device driver|nvidia-container-cli: "
)
# NCCL's own errors; a later, more specific text takes precedence.
NCCL_ERRORS = re.compile(
    r"\b[NRH]CCL (?:function )?error\b|\bERR\d{5} DIST call hccl"
    r"|\bnccl(?:Unhandled|System|Internal|Invalid)\w*Error?\b|\bncclSystemError\b"
)
# Timeouts of vLLM's processes waiting for each other.
TIMEOUT_TEXTS = re.compile(
    r"failed (?:liveness|startup) probe, will be restarted"
    r"|Timed out waiting for engine"
    r"|RPC call to .{0,80} timed out"
    r"|Did not receive response from front-end"
    r"|Watchdog caught collective operation timeout"
    r"|Heartbeat monitor timed out"
    r"|watchdog got stuck for"
    r"|Engine iteration timed out"
    r"|No heartbeat received from MQLLMEngine|MQLLMEngine didn't reply"
    r"|Timed out after \d+ seconds waiting for clients"
    r"|client socket has timed out after"
    r"|Timed out waiting \d+ms for"
    r"|[Ww]ait timeout after \d+ ?ms"
    r"|^TimeoutError\b(?!: (?:\[Errno|timed out|The \w+ operation))"
    r"|^(?:asyncio\.(?:exceptions\.)?|concurrent\.futures\.)TimeoutError\b"
    r"|^(?:\w+\.)*(?:Get|RayChannel)TimeoutError\b"
    r"|start operation timed out\. Terminating"
)
# Reports of a dead engine or Ray worker, without the reason.
DEATH_TEXTS = re.compile(
    r"EngineDeadError"
    r"|EngineCore encountered an issue"
    r"|engine core exited unexpectedly"
    r"|Engine process \(pid \d+\) died"
    r"|Engine loop has died|\b[Ee]ngine (?:is |already )?dead\b|Engine died"
    r"|MQLLMEngine is already dead"
    r"|(?:Worker|RayWorkerProc|Engine core) proc.{0,80} died unexpectedly|RayWorkerProc rank=\d+ died"
    r"|Worker \w+ pid \d+ died, exit code"
    r"|\bActorDiedError\b|\bRayActorError\b|actor died unexpectedly"
    r"|A worker died or was killed while executing|\bworker died\b"
    r"|Engine core initialization failed\. See root cause above"
    r"|Failed core proc\(s\): \{"
)
# Native crashes in the words of faulthandler, absl (Ray), torch and the shell.
NATIVE_SIGNALS = re.compile(
    r"\*\*\* (SIG(?:SEGV|BUS|ILL|FPE)) received at time"
    r"|^Fatal Python error: (Segmentation fault|Bus error|Illegal instruction|Floating.point exception)"
    r"|!+ (Segfault) encountered"
    r"|(Segmentation fault|Bus error|Illegal instruction|Floating point exception) \(core dumped\)"
    r"|^(Segmentation fault|Bus error)$"
    r"|^\[\d+\] +[+-]? *\d+ (segmentation fault|bus error|illegal hardware instruction|floating point exception)\b"
    r"|killed by signal: (Bus error|Segmentation fault)"
    r"|code=dumped, status=\d+/(SEGV|BUS|ILL|FPE)"
    r"|double free or corruption|free\(\): (?:invalid (?:pointer|size)|double free)|malloc\(\): "
    r"|corrupted (?:size|double-linked list)"
    r"|stack smashing detected"
    r"|trap (invalid opcode) ip:|(segfault) at [0-9a-f]+ ip"
)
SIGNAL_NAMES = {
    "SEGV": "SIGSEGV",
    "BUS": "SIGBUS",
    "ILL": "SIGILL",
    "FPE": "SIGFPE",
    "Segmentation fault": "SIGSEGV",
    "Segfault": "SIGSEGV",
    "segfault": "SIGSEGV",
    "invalid opcode": "SIGILL",
    "Bus error": "SIGBUS",
    "Illegal instruction": "SIGILL",
    "illegal hardware instruction": "SIGILL",
    "segmentation fault": "SIGSEGV",
    "bus error": "SIGBUS",
    "floating point exception": "SIGFPE",
    "Floating point exception": "SIGFPE",
    "Floating-point exception": "SIGFPE",
}
# Aborts, which follow their cause: a C++ exception or a watchdog.
ABORTS = re.compile(
    r"^Fatal Python error: Aborted|\*\*\* SIGABRT received at time|Aborted \(core dumped\)"
    r"|^terminate called after throwing an instance"
)
# Containers that exited with 128 + SIGILL, SIGABRT, SIGBUS, SIGFPE or SIGSEGV.
SIGNAL_EXITS = re.compile(r"(?i:exit(?:ed)?(?: with)?(?: exit)?(?: (?:status|code))?:? *\(?13[24569]\b)")
# SIGKILL, mostly from the kernel or because of a container's memory limit.
HOST_KILLS = re.compile(
    r"(?i:exit(?:ed)?(?: with)?(?: exit)?(?: (?:status|code))?:? *\(?137\b)"
    r"|^srun: error: \S+: tasks? [\d,-]+: (?:Killed|Out Of Memory)"
    r"|code=killed, status=9/KILL"
    r"|was sent SIGKILL! Perhaps out of memory"
    r"|^Killed$|: line \d+: +\d+ Killed\b|\bKilled +(?:vllm|python)"
    r"|^\[\d+\] +[+-]? *\d+ killed\b"
)
# Requests to stop: from a supervisor, a scheduler or a terminal.
STOPS = re.compile(
    r"\btrigger received signal=SIG(?:TERM|INT|HUP)|\*\*\* SIGTERM received at time"
    r"|^KeyboardInterrupt(?:: ?(?:terminated)?)?$"
    r"|^(?:slurmstepd|srun): error: .{0,200}\bCANCELLED\b|\bRPC Server was interrupted"
    r"|(?i:exit(?:ed)?(?: with)?(?: exit)?(?: (?:status|code))?:? *\(?143\b)"
)
# Failed commands; their own output is more specific.
FAILED_COMMANDS = re.compile(r"^(?:\w+\.)*CalledProcessError\b|Ninja build failed|Error building extension '")
# Re-raised exceptions, and reports of the exit of another process.
WRAPPERS = re.compile(
    r"WorkerProc initialization failed due to an exception"
    r"|Engine process failed to start"
    r"|EngineCore (?:failed to start|encountered a fatal error|hit an exception)"
    r"|WorkerProc (?:hit an exception|failed)"
    r"|AsyncLLM output_handler failed"
    r"|Background loop (?:has errored|is) "
    r"|Engine background task failed"
    r"|Engine loop is not running"
    r"|Task finished unexpectedly"
    r"|got fatal signal from worker processes"
    r"|Error executing method"
    r"|Exception in (?:callback|ASGI application|worker)|Exception in thread"
    r"|Killing local vLLM worker processes"
    r"|Application startup failed"
    r"|failed to be inspected"
    r"|^RuntimeError: Error raised in subprocess"
    r"|The following operation failed in the TorchScript interpreter"
    r"|^srun: error: \S+: tasks? [\d,-]+: Exited with"
    r"|\bRayTaskError\b"
    r"|^RuntimeError: cancelled$|CancelledError\b|KeyboardInterrupt|^SystemExit\b|GeneratorExit"
    r"|^Process [\w-]+:$|^subprocess exited|ninja: build stopped"
)
# Consequences of the exit of another process.
COLLATERAL = re.compile(
    r"Connection (?:closed by (?:remote )?peer|reset by peer|refused)|ConnectionResetError"
    r"|Broken pipe|BrokenPipeError|\bEOFError\b"
    r"|remote process exited|failed to recv, got 0 bytes|ncclRemoteError|Socket closed"
    r"|ContextTerminated|Event loop is closed|cannot schedule new futures|BrokenProcessPool|ClientDisconnect"
    r"|recvValueWithTimeout|Failed to check the .should dump. flag|Connection was likely closed"
)
# Ray's lists of possible causes.
SUPPOSITIONS = re.compile(
    r"potential root causes|common causes include|The process (?:is|was) killed by (?:SIGKILL by )?(?:the )?OOM killer"
    r"|If it is due to|possible that"
)
# Harmless, at whatever level they are printed.
NOISE = re.compile(
    r"CUDA kernel errors might be asynchronously|For debugging consider passing|Compile with `TORCH_USE_CUDA_DSA`"
    r"|^(?:Device-side assertion tracking|Search for `(?:cuda|hip)Error)"
    r"|^(?:frame #\d+|#\d+ |Exception raised from |PC: @|@ +0x)"
    r"|^(?:Dumping |SchedulerOutput\(|SchedulerStats\()"
    r"|Cannot use FA version|Failed to import Triton kernels|resource_tracker"
    r"|Error retrieving (?:safetensors|file list)"
    r"|destroy_process_group|\bUserWarning\b|\bFutureWarning\b|\bDeprecationWarning\b"
    r"|^(?:To fix this|If you|You can|Please |Try |Note: |Hint: )"
    r"|^Namespace\(|^args: "
    r"|ERR99999 UNKNOWN appli"
    r"|Failed to advance FSM|grammar rejected tokens|^Uncaught exception$"
)
# Headers of exceptions that end one request, a thread or a log line, but not the engine.
REQUEST_HEADERS = re.compile(
    r"Exception in ASGI application|Unexpected error pre-processing request|Invocation of .{0,60} method failed"
    r"|Error in preprocessing prompt|Error with model |[Ee]xception caught\. Request id|Error in .{0,60}generator"
    r"|Error in applying chat template|Failed to (?:compile grammar|abort|decode|load AsyncMultiModal)"
    r"|failed with an internal error during generation|^Request failed\.$|Task exception was never retrieved"
)
IGNORED_HEADERS = re.compile(
    r"Exception ignored in|--- Logging error ---|_report_usage|Exception in thread .{0,40}(?:usage|tqdm|Tqdm|monitor)"
    r"|Error in atexit|Error in sys\.excepthook"
)
# A log line whose arguments could not be printed, because the device that holds them has failed.
LOGGING_ERROR = "--- Logging error ---"
REQUEST_SOURCES = re.compile(
    r"^(?:serving\w*|chat_utils|protocol|logger|exception_handlers?|error_handling|api_router|preprocess\w*)\.py$"
)
STARTING_HEADER = re.compile(r"vLLM API server version|Initializing an? LLM engine \(v|^non-default args")
# These report a failed start, even after a log of serving.
STARTING_MARKS = re.compile(r"Engine core initialization failed|EngineCore failed to start|WorkerProc failed to start")
START_EVIDENCE = re.compile(
    r"Engine core initialization failed|failed to start|vLLM API server version|Initializing an? |[Ll]oading "
    r"|non-default|placement group|Resolved architecture|Capturing CUDA|Automatically detected platform|KV cache size"
    r"|, in (?:load_model|init_device|_init_executor|_initialize_kv_caches|wait_for_\w+|from_\w+_args|make_client)\b"
)
SERVING_MARKS = re.compile(
    r"Application startup complete|Uvicorn running on|Avg prompt throughput|\"(?:POST|GET) /\S* HTTP/\d"
    r"|(?:Added|Received|Finished|Aborted) request\b|output_handler failed|Engine background task failed"
    r"|EngineCore encountered a fatal error|Engine iteration timed out|MQLLMEngine is already dead"
    r"|, in (?:run_busy_loop|run_engine_loop|_process_engine_step|step_with_batch_queue|engine_step)\b"
    r"|, in (?:output_handler|check_health|run_heartbeat_loop)\b|(?:Rendering|Processed) prompts:|Adding requests:"
    r"|Dumping (?:scheduler output|input data)|\bEngineDeadError\b|start_worker_execution_loop"
    r"|_log_task_completion|_raise_exception_on_finish"
    r"|vllm/entrypoints/llm\.py\", line \d+, in (?:generate|chat|encode|embed|classify|score|_run_engine)\b"
)
QUOTED = re.compile(
    r"Worker failed with error ['\"](.+?)['\"](?:, please check|$)"
    r"|Exception in worker \w+ while processing method \w+: (.+?)(?:, Traceback \(most recent call last\):|\.?$)"
    r"|Call to \w+ method failed: (.+)"
    r"|Inspect the stacktrace to find the original error: (.+?)\.?$"
)
EXCEPTION_LINE = re.compile(
    r"^(?:[A-Za-z_]\w*\.){0,8}(?:[A-Z]\w*(?:Error|Exception|NotFound|Timeout|Failure|Failed|Unsupported)|OutOfResources)"
    r"(?:\(.{0,2000}\)|:(?: .*)?)?$"
)
# Anything that a traceback can end with.
TRACEBACK_END = re.compile(r"^(?:[A-Za-z_]\w*\.){0,8}[A-Z]\w{2,60}(?:: .*)?$|^(?:[a-z_]\w*\.){1,4}[a-z]\w*: ")
# Exceptions that are less informative than one raised while handling them.
TERSE_EXCEPTION = re.compile(
    r"^(?:\w+\.)*(?:KeyError|StopIteration|StopAsyncIteration|IndexError|Empty|LookupError|JSONDecodeError)\b"
)
CPP_WHAT = re.compile(r"^what\(\): +")
ERROR_WORDS = re.compile(
    r"^(?:Error|ERROR|FATAL|Fatal|fatal|panic)\b|panicked at |^Failed: |: not found$|: command not found"
)
# Printed between such a header and its traceback.
HEADER_DETAILS = ("future: <",)
DIRECT_CAUSE = "The above exception was the direct cause of the following exception"
DURING_HANDLING = "During handling of the above exception, another exception occurred"
TRACEBACK = "Traceback (most recent call last)"
# A text without any of these, in lower case, matches no pattern for a cause, a wrapper or noise. On ordinary lines,
# searching for them first is thirty times faster.
_KEYWORDS = (
    *("error", "fail", "memory", "xception", "timed ", "timeout", "died", "dead", "kill", "exit", "tatus", "cannot"),
    *("connect", "receive", "dump", "loop", "nvidia", "warning", "alloc", "space", "fatal", "invalid", "terminat"),
    *("corrupt", "fault", "panic", "smash", "cause", "possib", "due to", "not found", "notfound", "unsupported"),
    *("unable", "device", "assert", "kernel", "closed", "stuck", "xid", "nrt_", "interrupt", "compil", "resource"),
    *("#", "@", "fix this", "if you", "you can", "try ", "note: ", "hint: ", "args: ", "please ", "what():"),
    *("scheduler", "grammar", "usage", "max seq", "destroy_", "build stopped", "broken", "pass", "engine", "gpus"),
    *("ddress", "eaddrinuse", "nccl", "compat", "unexpected", "insufficient", "process ", "kiogpu", " hccl"),
    *(" unknown ", "9999", "runtime result", "success", "illegal hardware", "free()"),
)


def has_keyword(text: str) -> bool:
    """Whether ``text`` can match any pattern."""
    lower = text.lower()
    return any(word in lower for word in _KEYWORDS)
