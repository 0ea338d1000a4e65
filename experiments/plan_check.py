"""Whether ``lora-mini plan`` is right: what it says a step takes, and what the step then takes.

    python -m experiments.plan_check

Every row is a process of its own that runs ``finetune`` with a small random Llama on a CPU. After
the first step, when all has been compiled and run once, it asks Linux how much memory the process
has beside its arrays; what it has more at the peak of the steps that follow is what a step takes:
every array that the run holds, be it needed or not, and the temporaries. On a mesh of simulated
devices, which share the process, that is divided by their number. Writes
``results/plan_check.json`` and ``.md``; some minutes on a core.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from lora_mini_jax.commands.forecast import plan_step
from lora_mini_jax.files import write_json, write_text
from lora_mini_jax.models import Llama, LlamaConfig, save
from lora_mini_jax.options import PlanStep
from lora_mini_jax.options.adapter import BASE
from lora_mini_jax.runs.finetune import finetune
from lora_mini_jax.runs.meter import Meter

HERE = Path(__file__).parent
SHAPE = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
         "num_attention_heads": 8}  # fmt: skip
MINI = {"method": "lora-mini", "settings": ("rank=8", "a=64", "b=64")}
LORA = {"method": "lora", "settings": ("rank=16",)}
CHECKS: dict[str, dict[str, Any]] = {
    "LoRA-Mini": {**MINI, "batch_size": 8},
    "LoRA, scanned, remat full": {**LORA, "batch_size": 16, "scan_layers": True, "remat": "full"},
    "LoRA, scanned, remat dots_no_batch": {
        **LORA, "batch_size": 8, "scan_layers": True, "remat": "dots_no_batch"
    },
    "full fine-tuning": {"method": "full", "batch_size": 2},
    "MiSS on data=2": {"method": "miss", "batch_size": 8, "mesh": "data=2"},
    "full fine-tuning on fsdp=2": {"method": "full", "batch_size": 4, "mesh": "fsdp=2"},
    "LoRA-Mini on tensor=2": {**MINI, "batch_size": 8, "mesh": "tensor=2"},
    "LoRA on nf4, scanned, remat full": {
        **LORA, "batch_size": 16, "scan_layers": True, "remat": "full", "quantize": "nf4"
    },
}  # fmt: skip
STEPS = 3
Report = dict[str, Any]


def main() -> None:
    """Every check, and the table."""
    found = {name: check(SHAPE, given) for name, given in CHECKS.items()}
    write_json(HERE / "results" / "plan_check.json", found)
    write_text(HERE / "results" / "plan_check.md", table(found))
    print(table(found))


def check(shape: dict[str, int], given: dict[str, Any]) -> Report:
    """A model of this shape and the options of a run: the plan and what was measured, in bytes."""
    with TemporaryDirectory() as folder:
        make(Path(folder), shape)
        devices = 2 if given.get("mesh") else 1
        count = f"--xla_force_host_platform_device_count={devices}"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {count}"
        # What is freed goes back to the system at once, and so does not hide what comes after.
        malloc = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": str(2**18)}
        own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **malloc}
        command = [sys.executable, "-m", "experiments.plan_check", folder, json.dumps(given)]
        ran = subprocess.run(command, env=os.environ | own, cwd=HERE.parent, capture_output=True,
                             text=True, check=False)  # fmt: skip
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    return json.loads(ran.stdout.splitlines()[-1])


def make(folder: Path, shape: dict[str, int]) -> None:
    """A random model with a tokenizer, and text for it."""
    model, tokens = Llama(LlamaConfig(**shape)), jnp.zeros((1, 2), jnp.int32)  # ty: ignore[invalid-argument-type]
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    save(folder / "model", model, params, tokenizer_from=BASE)
    random = Random(0)
    rows = [{"text": " ".join(random.choices(("one", "two", "three"), k=100))} for _ in range(200)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(folder: Path, given: dict[str, Any]) -> Report:
    """One row, in a process of its own."""
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    options = PlanStep(model=str(folder / "model"), data=str(folder / "text.jsonl"), samples=0,
                       max_valid_examples=2,
                       output_dir=str(folder / "run"), max_steps=STEPS, **given)  # fmt: skip
    plan = plan_step(options)
    before, after = grown(options)
    total, devices = plan["bytes_per_device"]["total"], plan["devices"]
    taken = (after - before) / devices
    return {
        "options": {**given, "max_length": options.max_length},
        "planned": plan["bytes_per_device"],
        "measured": round(taken),
        "before": before,
        "planned_over_measured": round(total / taken, 3),
    }


def grown(options: PlanStep) -> tuple[int, int]:
    """Resident bytes beside the arrays after the first step of ``finetune``, and at the peak of
    those that follow."""
    add, seen = Meter.add, []

    def noting(self: Meter, metrics: Any, tokens: Any) -> None:
        add(self, metrics, tokens)
        jax.block_until_ready((metrics, tokens))
        seen.append(resident("VmHWM"))
        if len(seen) == 1:
            trim()
            seen[0] = resident("VmRSS") - held()
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak

    with mock.patch.object(Meter, "add", noting):
        finetune(options, say=lambda line: None)
    return seen[0], seen[-1]


def held() -> int:
    """Bytes of all the arrays there are; of one that is on several devices, on each of them."""
    arrays = [array for array in jax.live_arrays() if not array.is_deleted()]
    shards = [shard.data for array in arrays for shard in array.addressable_shards]
    return sum({data.unsafe_buffer_pointer(): data.nbytes for data in shards}.values())


def trim() -> None:
    """Give back what the process has freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident(name: str) -> int:
    """``VmRSS``, what the process has in memory, or ``VmHWM``, the most since it was forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def table(found: dict[str, Report]) -> str:
    """A markdown table; MiB on each device."""
    lines = ["| step | planned MiB | measured MiB | planned / measured |", "|---|---:|---:|---:|"]
    for name, row in found.items():
        sizes = row["planned"]["total"] / 2**20, row["measured"] / 2**20
        lines.append(f"| {name} | {sizes[0]:,.0f} | {sizes[1]:,.0f} | "
                     f"{row['planned_over_measured']:.2f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(json.dumps(measure(Path(sys.argv[1]), json.loads(sys.argv[2]))))
