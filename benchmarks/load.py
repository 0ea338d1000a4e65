"""What loading a model costs: peak memory, and time next to merely reading its tensors.

    python -m benchmarks.load [--json PATH] [--folder PATH]

Makes a random model of 1.5 billion bfloat16 parameters in four files (3.1 GB) and, in a process
each, in turn: reads every tensor of it by safetensors; loads it; loads it with stacked layers.
Trust ``time_ratio``, over the first, before seconds, and on a busy machine ``cpu_ratio`` before
both. Files are read once before, so that the disk is not part of it. Linux only: memory is the
kernel's VmHWM.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro

from lora_mini_jax.files import write_json
from lora_mini_jax.models.llama_config import LlamaConfig

SHAPE = LlamaConfig(
    architecture="Qwen2ForCausalLM", vocab_size=151936, hidden_size=1536,
    intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
    tie_word_embeddings=True, max_position_embeddings=32768,
)  # fmt: skip
"""Qwen2.5-1.5B."""

HOW = ("safetensors", "load", "load stacked")


@dataclass(frozen=True)
class Options:
    """Where to, and how often."""

    json: Path | None = None
    """Where to write the rows; its folder is made."""
    folder: Path | None = None
    """Where to make the model, and leave it; by default a temporary place."""
    rounds: int = 3


def room(place: Path, gigabytes: float) -> str | None:
    """Why a large model cannot be measured here; None if it can."""
    if not Path("/proc/self/clear_refs").exists():
        return "peak memory is measured on Linux only"
    free = shutil.disk_usage(place).free / 1e9
    return None if free >= gigabytes else f"{free:.1f} GB free at {place}, {gigabytes} needed"


def write_random(folder: Path, config: LlamaConfig = SHAPE, files: int = 4) -> None:
    """A model of random bfloat16 numbers, in shards."""
    import jax.numpy as jnp
    from safetensors.numpy import save_file

    from lora_mini_jax.models.llama import FAMILY, Llama
    from lora_mini_jax.tree import flatten

    folder.mkdir(parents=True)
    slots: dict[str, tuple[int, ...]] = {}
    for path, leaf in flatten(FAMILY.shapes(Llama(config))).items():
        shape = leaf.shape[::-1] if FAMILY.flips(path) else leaf.shape
        slots |= dict.fromkeys(FAMILY.names(path, config.num_hidden_layers), shape)
    noise = np.random.default_rng(0).normal(size=1 << 20).astype(jnp.bfloat16)
    names, where = list(slots), {}
    for i in range(files):
        shard = f"model-{i + 1:05}-of-{files:05}.safetensors"
        part = names[i::files]
        save_file({name: np.resize(noise, slots[name]) for name in part}, folder / shard)
        where |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))


def read_all(folder: Path) -> int:
    """Read every tensor by safetensors, and keep them; how many bytes they are."""
    from safetensors.numpy import load_file

    tensors = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return sum(tensor.nbytes for part in tensors for tensor in part.values())


def load_all(folder: Path, scan: bool) -> int:
    """Load the model as it is; how many bytes it is."""
    import jax
    import jax.numpy as jnp

    from lora_mini_jax.models import load

    _, params = load(folder, param_dtype=jnp.bfloat16, scan_layers=scan)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def inside(how: str, folder: Path) -> dict[str, Any]:
    """Time and memory of one way to read a folder, in this process."""
    import jax
    import jax.numpy as jnp

    for needed in ("lora_mini_jax.models", "safetensors.numpy"):
        import_module(needed)  # before the clock runs
    jax.block_until_ready(jnp.zeros(1))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before, began, worked = _peak(), time.perf_counter(), time.process_time()
    if how == "safetensors":
        size = read_all(folder)
    else:
        size = load_all(folder, scan=how == "load stacked")
    return {"how": how, "seconds": time.perf_counter() - began, "result_bytes": size,
            "cpu_seconds": time.process_time() - worked,
            "peak_growth": _peak() - before}  # fmt: skip


def _peak() -> int:
    """The most memory that this process has had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def child(arguments: list[str], devices: int = 1) -> str:
    """What another Python says, on so many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=env, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def measure(folder: Path, how: str) -> dict[str, Any]:
    """One row of `inside`, in a process of its own."""
    row = json.loads(child(["-m", "benchmarks.load", "--inside", how, str(folder)]))
    return row | {"file_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors"))}


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark; print the rows and write them."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    place = Path(tempfile.mkdtemp()) if options.folder is None else options.folder
    folder = place / "model"
    try:
        if not folder.exists():
            if reason := room(place, gigabytes=8):
                raise SystemExit(reason)
            write_random(folder)
        measure(folder, HOW[0])  # the files are in memory from here on
        rounds = [[measure(folder, how) for how in HOW] for _ in range(options.rounds)]
    finally:
        if options.folder is None:
            shutil.rmtree(place)
    rows = [summary([row[i] for row in rounds], rounds) for i in range(len(HOW))]
    for row in rows:
        print(f"{row['how']:14} {row['seconds']:6.2f} s  x{row['time_ratio']:.2f} "
              f"(processor x{row['cpu_ratio']:.2f})  peak "
              f"x{row['peak_ratio']:.3f} of the file")  # fmt: skip
    if options.json is not None:
        write_json(options.json, {
            "command": "python -m benchmarks.load", "rounds": options.rounds,
            "processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(),
            "rows": rows,
        })  # fmt: skip


def summary(row: list[dict[str, Any]], rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds, and what they are in the first way of the same round."""

    def ratio(key: str) -> float:
        return median(one[key] / all_[0][key] for one, all_ in zip(row, rounds, strict=True))

    return {
        "how": row[0]["how"], "file_bytes": row[0]["file_bytes"],
        "seconds": median(one["seconds"] for one in row), "time_ratio": ratio("seconds"),
        "cpu_seconds": median(one["cpu_seconds"] for one in row),
        "cpu_ratio": ratio("cpu_seconds"),
        "peak_growth": max(one["peak_growth"] for one in row),
        "peak_ratio": max(one["peak_growth"] / one["file_bytes"] for one in row),
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        print(json.dumps(inside(sys.argv[2], Path(sys.argv[3]))))
    else:
        main()
