"""A landscape of one knob that tests vary, and the file that holds it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sidecar.bench.landscape import Landscape, load_landscapes

Answer = Mapping[str, Any]

SOURCE = '''
class Slope:
    """Latency grows with the sequences, and above 64 of them it crashes."""

    fast_ms = 500.0

    def space(self):
        return {"max_num_seqs": {"type": "int", "low": 4.0, "high": 128.0, "log": True}}

    def host(self):
        return {"gpu_total_gib": 80, "gpu_free_gib": 79, "weights_gib": 15, "kv_bytes_per_token": 131072,
                "max_len_needed": 2048}

    def slo(self):
        return {"ttft_p99_ms": 400.0}

    def incumbent(self):
        return {"max_num_seqs": 32.0, "max_model_len": 2048.0}

    def evaluate(self, config, rng):
        seqs = config["max_num_seqs"]
        if seqs > 64:
            return {"status": "crashed", "cost_s": 20}
        return {"status": "feasible" if seqs < 48 else "infeasible", "ttft_p99_ms": 5.0 * seqs,
                "latency_ms": 10.0 * seqs + rng.uniform(), "cost_s": 60}
'''
INSTANCE = f"{SOURCE}\nLANDSCAPES = {{'slope': Slope()}}\n"


def write(folder: Path, text: str = INSTANCE) -> Path:
    path = folder / "slope.py"
    path.write_text(text, encoding="utf-8")
    return path


def slope(folder: Path, text: str = INSTANCE) -> Landscape:
    return load_landscapes(write(folder, text))["slope"]


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


LISTED = [
    "landscape",
    "optimizer",
    "seeds",
    "found",
    "first_feasible_median",
    "crashes_mean",
    "feasible_mean",
    "best_median",
    "best_std",
    "cost_s_mean",
]
