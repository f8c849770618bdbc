"""How vLLM is started in 40 public repositories: the arguments as found there, in texts of our own.

``words`` are the arguments that vLLM gets, as one line. ``foreign`` are those that vLLM 0.32 does not have, and
``said`` is what `sloguard init` must say.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LaunchCase:
    """One start of vLLM. ``option`` and ``name`` are how init is called, ``text`` the command or the file."""

    text: str
    words: str
    option: str = "--from"
    file: str = ""
    name: str = ""
    port: int | None = None
    env: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    said: tuple[str, ...] = ()

    def source(self, folder: Path) -> str:
        """The option's value; a file is written first."""
        if not self.file:
            return self.text
        path = folder / self.file
        path.write_text(self.text, encoding="utf-8")
        return f"{path}:{self.name}" if self.name else str(path)


def _compose(body: str, more: str = "") -> str:
    lines = "".join(f"    {line}\n" for line in body.strip("\n").split("\n"))
    return f"services:\n  llm:\n{lines}{more}"


def _pod(container: str, others: str = "") -> str:
    lines = "".join(f"          {line}\n" for line in container.strip("\n").split("\n"))
    return (
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: llm}\nspec:\n  template:\n    spec:\n"
        f"      containers:\n        - name: engine\n{lines}{others}"
        "---\napiVersion: v1\nkind: Service\nmetadata: {name: llm}\nspec: {ports: [{port: 80}]}\n"
    )


def _unit(lines: str) -> str:
    return f"[Unit]\nDescription=LLM\n[Service]\n{lines}\nRestart=always\n[Install]\nWantedBy=multi-user.target\n"


_API = "python3 -m vllm.entrypoints.openai.api_server"
_IMAGE = "in a container of vllm/vllm-openai"

COMMANDS = {
    "plain": LaunchCase(
        "vllm serve mistralai/Mistral-7B-Instruct-v0.3 --port 8000",
        "mistralai/Mistral-7B-Instruct-v0.3",
        port=8000,
    ),
    "swap space of old versions": LaunchCase(
        "vllm serve gradientai/Llama-3-8B-1048k --swap-space 16 --disable-log-requests --tensor_parallel_size 1"
        " --max_model_len 65000",
        "gradientai/Llama-3-8B-1048k --tensor-parallel-size 1 --max-model-len 65000",
        foreign=("swap_space", "disable_log_requests"),
        said=("--swap-space is not an argument of vLLM 0.32", "--disable-log-requests is not an argument"),
    ),
    "lora module": LaunchCase(
        "vllm serve Qwen/Qwen3-8B --lora-modules tuned=./peft",
        "Qwen/Qwen3-8B --lora-modules tuned=./peft",
    ),
    "ngram speculation": LaunchCase(
        "vllm serve Qwen/Qwen3-4B --port 8000 --enable-prefix-caching \\\n  --speculative_config"
        """ '{"method": "ngram", "num_speculative_tokens": 5}'""",
        "Qwen/Qwen3-4B --enable-prefix-caching --speculative-config"
        """ '{"method": "ngram", "num_speculative_tokens": 5}'""",
        port=8000,
    ),
    "variables before it": LaunchCase(
        "MODEL=org/base-7b\nexport VLLM_USE_V1=1 VLLM_NO_USAGE_STATS=1\nTP=2\nvllm serve ${MODEL} --port 8010"
        " --tensor-parallel-size ${TP} --gpu-memory-utilization 0.90 --enforce-eager --block-size 64"
        " --no-enable-log-requests --no-enable-prefix-caching > server.log 2>&1 &\nsleep 3\n",
        "org/base-7b --tensor-parallel-size 2 --gpu-memory-utilization 0.90 --enforce-eager --block-size 64"
        " --no-enable-log-requests --no-enable-prefix-caching",
        port=8010,
        env=("VLLM_USE_V1", "VLLM_NO_USAGE_STATS"),
    ),
    "defaults of variables": LaunchCase(
        'exec vllm serve "${MODEL:-org/teacher}" --served-model-name teacher --max-model-len "${MAXLEN:-6144}"'
        " --gpu-memory-utilization 0.92 --kv-cache-dtype fp8 --max-num-seqs 128 --port 8001",
        "org/teacher --served-model-name teacher --max-model-len 6144 --gpu-memory-utilization 0.92"
        " --kv-cache-dtype fp8 --max-num-seqs 128",
        port=8001,
    ),
    "a variable that is not known": LaunchCase(
        "vllm serve org/m --port $PORT --max-model-len $(nproc) --max-num-seqs 4",
        "org/m --max-num-seqs 4",
        said=("--port $PORT is not kept: the value of $PORT is not known", "--max-model-len $(nproc) is not kept"),
    ),
    "api server module": LaunchCase(
        "CUDA_VISIBLE_DEVICES=0 python -m vllm.entrypoints.openai.api_server --model org/poly-5.8b --host 10.1.2.3"
        " --port 8123 --tensor-parallel-size 1",
        "org/poly-5.8b --tensor-parallel-size 1",
        port=8123,
        env=("CUDA_VISIBLE_DEVICES",),
    ),
    "key on the command line": LaunchCase(
        "vllm serve deepseek-ai/DeepSeek-R1-Distill-Qwen-32B --dtype auto --api-key token-abc",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B --dtype auto",
        secrets=("VLLM_API_KEY",),
    ),
    "expert balance": LaunchCase(
        "vllm serve deepseek-ai/DeepSeek-V3 --tensor-parallel-size 1 --data-parallel-size 8 --enable-expert-parallel"
        " --all2all-backend deepep_low_latency --enable-eplb --eplb-config"
        """ '{"window_size":1000,"step_interval":3000,"num_redundant_experts":2}'""",
        "deepseek-ai/DeepSeek-V3 --tensor-parallel-size 1 --data-parallel-size 8 --enable-expert-parallel"
        " --all2all-backend deepep_low_latency --enable-eplb --eplb-config"
        """ '{"window_size":1000,"step_interval":3000,"num_redundant_experts":2}'""",
    ),
    "logits processors and a limit": LaunchCase(
        "vllm serve deepseek-ai/DeepSeek-OCR-2 --host 0.0.0.0 --max-model-len 8192 --logits_processors"
        " a.b:NGramProcessor --no-enable-prefix-caching --mm-processor-cache-gb 0 --limit-mm-per-prompt"
        """ '{"image": 1}'""",
        "deepseek-ai/DeepSeek-OCR-2 --max-model-len 8192 --logits-processors a.b:NGramProcessor"
        """ --no-enable-prefix-caching --mm-processor-cache-gb 0 --limit-mm-per-prompt '{"image": 1}'""",
    ),
    "nested transfer": LaunchCase(
        "vllm serve deepseek-ai/DeepSeek-V4-Flash --tensor-parallel-size 8 --kv-transfer-config '{\n"
        '  "kv_connector": "disk-cache", "kv_role": "kv_both",\n'
        '  "engine_id": "a", "kv_connector_extra_config": {"path": "/kv"}\n}\'',
        "deepseek-ai/DeepSeek-V4-Flash --tensor-parallel-size 8 --kv-transfer-config"
        """ '{"kv_connector": "disk-cache", "kv_role": "kv_both", "engine_id": "a","""
        """ "kv_connector_extra_config": {"path": "/kv"}}'""",
    ),
    "moe with mtp": LaunchCase(
        "vllm serve org/v4 --tensor-parallel-size 4 --kv-cache-dtype fp8 --block-size 256 --max-num-batched-tokens 8192"
        """ --speculative-config '{"method":"mtp","num_speculative_tokens":1}' --tokenizer-mode deepseek_v4"""
        " --tool-call-parser deepseek_v4 --enable-auto-tool-choice --reasoning-parser deepseek_v4"
        """ --disable-custom-all-reduce --compilation-config '{"cudagraph_capture_sizes":[1,2,4,8]}'""",
        "org/v4 --tensor-parallel-size 4 --kv-cache-dtype fp8 --block-size 256 --max-num-batched-tokens 8192"
        """ --speculative-config '{"method":"mtp","num_speculative_tokens":1}' --tokenizer-mode deepseek_v4"""
        " --tool-call-parser deepseek_v4 --enable-auto-tool-choice --reasoning-parser deepseek_v4"
        """ --disable-custom-all-reduce --compilation-config '{"cudagraph_capture_sizes":[1,2,4,8]}'""",
    ),
    "pass config": LaunchCase(
        "vllm serve org/70b --trust-remote-code --quantization modelopt --pipeline-parallel-size 1"
        " --enable-chunked-prefill --async-scheduling --no-enable-prefix-caching --compilation-config"
        """ '{"pass_config": {"fuse_allreduce_rms": true}, "custom_ops": ["+rms_norm"]}'""",
        "org/70b --trust-remote-code --quantization modelopt --pipeline-parallel-size 1"
        " --enable-chunked-prefill --async-scheduling --no-enable-prefix-caching --compilation-config"
        """ '{"pass_config": {"fuse_allreduce_rms": true}, "custom_ops": ["+rms_norm"]}'""",
    ),
    "a dotted part": LaunchCase(
        "vllm serve org/m --compilation-config.cudagraph_mode=NONE --compilation-config.custom_ops+ +rms_norm,+silu",
        "org/m --compilation-config.cudagraph_mode=NONE --compilation-config.custom_ops+ +rms_norm,+silu",
    ),
    "optimization level": LaunchCase(
        "vllm serve org/kimi -O3 --block-size 64 --max-model-len 118400 --enable-chunked-prefill"
        " --disable-hybrid-kv-cache-manager",
        "org/kimi -O3 --block-size 64 --max-model-len 118400 --enable-chunked-prefill"
        " --disable-hybrid-kv-cache-manager",
    ),
    "short names and sizes": LaunchCase(
        "vllm serve org/m -tp 2 -pp=1 -q awq -dp 2 -ep --max-model-len 128k --max-num-batched-tokens 8K",
        "org/m -tp 2 -pp=1 -q awq -dp 2 -ep --max-model-len 128k --max-num-batched-tokens 8K",
    ),
    "several names": LaunchCase(
        "/usr/local/bin/vllm serve /srv/compiled --served-model-name org/a b org/c --max-num-seqs 1 --port 30093",
        "/srv/compiled --served-model-name org/a b org/c --max-num-seqs 1",
        port=30093,
    ),
    "chat template arguments": LaunchCase(
        "vllm serve org/qwen --reasoning-parser qwen3 --mamba-cache-mode align --prefix-match-unit 128"
        """ --default-chat-template-kwargs '{"reasoning_effort":"medium"}' --kv-cache-memory 5261334938""",
        "org/qwen --reasoning-parser qwen3 --mamba-cache-mode align --prefix-match-unit 128"
        """ --default-chat-template-kwargs '{"reasoning_effort":"medium"}' --kv-cache-memory-bytes 5261334938""",
        said=("--kv-cache-memory is a short form of --kv-cache-memory-bytes",),
    ),
    "pooling": LaunchCase(
        "vllm serve Qwen/Qwen3-Embedding-0.6B --host 127.0.0.1 --port 8081 --runner pooling"
        " --gpu-memory-utilization 0.08",
        "Qwen/Qwen3-Embedding-0.6B --runner pooling --gpu-memory-utilization 0.08",
        port=8081,
    ),
    "wrapped in bash": LaunchCase(
        'setsid bash -c "vllm serve org/m --trust-remote-code --dtype float16 --port 9000 > log 2>&1" &',
        "org/m --trust-remote-code --dtype float16",
        port=9000,
    ),
    "in an environment of uv": LaunchCase(
        "NCCL_P2P_DISABLE=1 uv run vllm serve org/m --language-model-only --max-num-batched-tokens 8192 --port 8000",
        "org/m --language-model-only --max-num-batched-tokens 8192",
        port=8000,
        env=("NCCL_P2P_DISABLE",),
    ),
    "revision and tokenizer": LaunchCase(
        f"exec {_API} --model org/judge --revision 0123abc --tokenizer org/judge --max-model-len 32768"
        " --language-model-only --no-use-tqdm-on-load",
        "org/judge --revision 0123abc --tokenizer org/judge --max-model-len 32768 --language-model-only"
        " --no-use-tqdm-on-load",
    ),
    "docker with a key": LaunchCase(
        "docker run -d --runtime nvidia --gpus all -v ~/.cache/huggingface:/root/.cache/huggingface -p 9898:8000"
        " --ipc=host vllm/vllm-openai:latest --model Qwen/Qwen2.5-7B-Instruct --max_model_len 1024 --api-key secret"
        " --gpu_memory_utilization 0.7",
        "Qwen/Qwen2.5-7B-Instruct --max-model-len 1024 --gpu-memory-utilization 0.7",
        port=9898,
        secrets=("VLLM_API_KEY",),
        said=(_IMAGE, "clients used port 9898"),
    ),
    "docker with variables": LaunchCase(
        "docker run -it --rm --gpus='\"device=0\"' --ulimit memlock=-1 -e NCCL_P2P_DISABLE=1 -e HF_TOKEN=abc"
        " vllm/vllm-openai:v0.7.2 --model /workspace/m --tool-call-parser hermes --enable-auto-tool-choice"
        " --quantization bitsandbytes --load-format bitsandbytes",
        "/workspace/m --tool-call-parser hermes --enable-auto-tool-choice --quantization bitsandbytes"
        " --load-format bitsandbytes",
        env=("NCCL_P2P_DISABLE",),
        secrets=("HF_TOKEN",),
        said=(_IMAGE,),
    ),
}

UNITS = {
    "unit with a continuation": LaunchCase(
        _unit(
            'Environment="VLLM_ATTENTION_BACKEND=FLASHINFER"\nExecStart=/usr/local/bin/vllm serve org/4b-FP8 \\\n'
            "  --max-model-len 131072 \\\n  --kv-cache-dtype fp8_e5m2 \\\n  --gpu-memory-utilization 0.95 \\\n"
            "  --calculate-kv-scales --host 0.0.0.0 --port 8000"
        ),
        "org/4b-FP8 --max-model-len 131072 --kv-cache-dtype fp8_e5m2 --gpu-memory-utilization 0.95",
        option="--from-unit",
        file="vllm.service",
        port=8000,
        env=("VLLM_ATTENTION_BACKEND",),
        foreign=("calculate_kv_scales",),
    ),
    "unit with a variable": LaunchCase(
        _unit("Environment=MODEL=llama3.2\nExecStart=/opt/v/bin/vllm serve ${MODEL} --host 127.0.0.1 --port 8000"),
        "llama3.2",
        option="--from",
        file="llm.service",
        port=8000,
        env=("MODEL",),
    ),
    "unit with devices": LaunchCase(
        _unit(
            'Environment="HF_HOME=/data/models"\nEnvironment="CUDA_VISIBLE_DEVICES=0,1,2,3"\n'
            "Environment=HF_TOKEN=hf_x\nExecStart=-/usr/local/bin/vllm serve meta-llama/Llama-3.1-70B-Instruct"
            " --tensor-parallel-size 4 --gpu-memory-utilization 0.90"
        ),
        "meta-llama/Llama-3.1-70B-Instruct --tensor-parallel-size 4 --gpu-memory-utilization 0.90",
        option="--from-unit",
        file="vllm.service",
        env=("HF_HOME", "CUDA_VISIBLE_DEVICES"),
        secrets=("HF_TOKEN",),
    ),
    "unit with the module": LaunchCase(
        _unit(
            "WorkingDirectory=/mnt/data\nExecStart=/mnt/venv/bin/python -m vllm.entrypoints.openai.api_server"
            " --model /mnt/models/30b --served-model-name Lexi --tensor-parallel-size 4 --dtype float16"
            " --max-num-seqs 8 --swap-space 12 --max-model-len 32000 --enforce-eager --port 8008"
        ),
        "/mnt/models/30b --served-model-name Lexi --tensor-parallel-size 4 --dtype float16 --max-num-seqs 8"
        " --max-model-len 32000 --enforce-eager",
        option="--from-unit",
        file="lexi.service",
        port=8008,
        foreign=("swap_space",),
        said=("relative paths are relative to /mnt/data",),
    ),
}

COMPOSE = {
    "compose with a folded command": LaunchCase(
        _compose(
            "image: vllm/vllm-openai:latest\nports: ['8000:8000']\nenvironment:\n  - HUGGING_FACE_HUB_TOKEN=\n"
            "command: >\n  --model /models/mistral\n  --gpu-memory-utilization 0.98\n  --max-model-len 2048\n"
            "  --max-num-seqs 64"
        ),
        "/models/mistral --gpu-memory-utilization 0.98 --max-model-len 2048 --max-num-seqs 64",
        option="--from-compose",
        file="compose.yaml",
        secrets=("HUGGING_FACE_HUB_TOKEN",),
        said=(_IMAGE,),
    ),
    "compose with a list": LaunchCase(
        _compose(
            "image: vllm/vllm-openai:v0.6.3\ncommand: ['--model', /app/vision, '--gpu-memory-utilization', '0.65',"
            " '--max-num-seqs', '2', '--tensor-parallel-size', '2', '--quantization', fp8, '--enforce-eager']"
        ),
        "/app/vision --gpu-memory-utilization 0.65 --max-num-seqs 2 --tensor-parallel-size 2 --quantization fp8"
        " --enforce-eager",
        option="--from-compose",
        file="docker-compose.yml",
    ),
    "compose with defaults": LaunchCase(
        _compose(
            "image: vllm/vllm-openai:latest\nenvironment:\n  HF_TOKEN: ${SLOGUARD_TEST_TOKEN}\ncommand: --model"
            " ${SLOGUARD_TEST_MODEL:-google/gemma-2-9b-it} --gpu-memory-utilization ${SLOGUARD_TEST_GPU:-1.0}"
            " --tensor-parallel-size ${SLOGUARD_TEST_TP:-4} --host 0.0.0.0 --port 8000"
        ),
        "google/gemma-2-9b-it --gpu-memory-utilization 1.0 --tensor-parallel-size 4",
        option="--from",
        file="compose.yaml",
        port=8000,
        secrets=("HF_TOKEN",),
    ),
    "compose with an entry point": LaunchCase(
        _compose(
            "image: registry/llm:3\nenvironment: {NAME: org/7b, GPUS: 2}\nentrypoint: [python3, -m,"
            " vllm.entrypoints.openai.api_server, --model, $$NAME, --tensor-parallel-size, $$GPUS]"
        ),
        "org/7b --tensor-parallel-size 2",
        option="--from-compose",
        file="compose.yaml",
        env=("NAME", "GPUS"),
    ),
    "compose with several services": LaunchCase(
        _compose(
            "image: vllm/vllm-openai:latest\ncommand: --model org/chat --max-model-len 8192",
            "  embedding:\n    image: vllm/vllm-openai:latest\n    command: --model /models/bge"
            " --served-model-name bge\n  db: {image: 'postgres:15'}\n",
        ),
        "/models/bge --served-model-name bge",
        option="--from",
        file="compose.yaml",
        name="embedding",
    ),
    "compose with lora": LaunchCase(
        _compose(
            "image: vllm/vllm-openai:latest\ncommand: >\n  --model org/8b\n  --enable-lora\n  --lora-modules\n"
            "    medical=/adapters/medical\n    legal=/adapters/legal\n  --max-loras 16\n  --max-lora-rank 64"
        ),
        "org/8b --enable-lora --lora-modules medical=/adapters/medical legal=/adapters/legal --max-loras 16"
        " --max-lora-rank 64",
        option="--from-compose",
        file="compose.yaml",
    ),
}

DEPLOYMENTS = {
    "deployment with arguments": LaunchCase(
        _pod(
            "image: vllm/vllm-openai:v0.6.6\nargs: ['--model', /models/pro, '--tensor-parallel-size', '2',"
            " '--max-model-len', '32768', '--enable-prefix-caching', '--max-num-seqs', '64']\n"
            "env: [{name: CUDA_VISIBLE_DEVICES, value: '0,1'}]"
        ),
        "/models/pro --tensor-parallel-size 2 --max-model-len 32768 --enable-prefix-caching --max-num-seqs 64",
        option="--from-deployment",
        file="deployment.yaml",
        env=("CUDA_VISIBLE_DEVICES",),
        said=(_IMAGE,),
    ),
    "deployment with equals signs": LaunchCase(
        _pod(
            "image: vllm/vllm-openai:nightly\ncommand: [python3, -m, vllm.entrypoints.openai.api_server]\n"
            "args: ['--model=org/w4a16', '--gpu-memory-utilization=0.95', '--max-model-len=32768']"
        ),
        "org/w4a16 --gpu-memory-utilization=0.95 --max-model-len=32768",
        option="--from-deployment",
        file="vllm-gpu.yaml",
    ),
    "deployment with a shell": LaunchCase(
        _pod(
            "image: vllm/vllm-openai:latest\ncommand: [/bin/sh, -c]\nargs:\n  - vllm serve"
            " mistralai/Mistral-7B-Instruct-v0.3 --trust-remote-code --enable-chunked-prefill"
            " --max_num_batched_tokens 1024\n"
            "env: [{name: HF_TOKEN, valueFrom: {secretKeyRef: {name: hf, key: token}}}]"
        ),
        "mistralai/Mistral-7B-Instruct-v0.3 --trust-remote-code --enable-chunked-prefill --max-num-batched-tokens 1024",
        option="--from-deployment",
        file="deployment.yaml",
        secrets=("HF_TOKEN",),
    ),
    "deployment with a sidecar": LaunchCase(
        _pod(
            "image: vllm/vllm-openai:v0.26.0\nargs: [$(MODEL_PATH), --tensor-parallel-size, '8',"
            " --pipeline-parallel-size, '4']\nenv: [{name: MODEL_PATH, value: /models/72b}]",
            "        - name: metrics\n          image: prom/statsd\n",
        ),
        "/models/72b --tensor-parallel-size 8 --pipeline-parallel-size 4",
        option="--from",
        file="deployment.yaml",
        env=("MODEL_PATH",),
        said=("the other containers are left alone: metrics",),
    ),
    "deployment with tools": LaunchCase(
        _pod(
            "image: registry/llm\nargs: ['--model', meta-llama/Llama-3.2-3B-Instruct, '--enable-auto-tool-choice',"
            " '--chat-template', /templates/tool.jinja, '--tool-call-parser', llama3_json, '--port', '8000',"
            " '--dtype', half, '--max-model-len', '8192']"
        ),
        "meta-llama/Llama-3.2-3B-Instruct --enable-auto-tool-choice --chat-template /templates/tool.jinja"
        " --tool-call-parser llama3_json --dtype half --max-model-len 8192",
        option="--from-deployment",
        file="deployment.yaml",
        name="engine",
        port=8000,
    ),
}

LAUNCH_CASES: dict[str, LaunchCase] = {**COMMANDS, **UNITS, **COMPOSE, **DEPLOYMENTS}
