"""What a step of large models would take: ``lora-mini plan`` of some, side by side.

    python -m experiments.plans [NAME ...]

Writes ``results/plans.json`` and a table, ``results/plans.md``; with names, of some plans, all
others stay as they were. Needs no weights and no device, and libtpu for those that are compiled for
TPUs; a minute or two for each model and method.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lora_mini_jax.files import write_json, write_text

RESULTS = Path(__file__).parent / "results"
CONFIGS = Path(__file__).parent / "configs"
COMMON = ["--dtype", "bfloat16", "--remat", "full", "--scan-layers", "--max-length", "2048"]
MINI = ["--method", "lora-mini", "--rank", "8", "--a", "64", "--b", "64"]
ON_16 = ["llama-3-8b", "--mesh", "fsdp=4,tensor=4", "--batch-size", "16"]
ON_64 = ["llama-3-70b", "--mesh", "fsdp=16,tensor=4", "--batch-size", "16"]
PLANS = {
    "Llama-3-8B on one device": ["llama-3-8b", "--mesh", "data=1", "--batch-size", "2"],
    "Llama-3-8B on 4 x 4": ON_16,
    "Llama-3-70B on 64": ON_64,
    "Llama-3-8B on v5e:4x4": [*ON_16, "--tpu", "v5e:4x4"],
    "Llama-3-70B on v5e:8x8": [*ON_64, "--tpu", "v5e:8x8"],
}
METHODS = {"LoRA-Mini r=8 a=b=64": MINI, "LoRA r=16": ["--method", "lora", "--rank", "16"],
           "full": ["--method", "full"]}  # fmt: skip


def main(names: list[str]) -> None:
    """Every plan, or those named, with every method."""
    file = RESULTS / "plans.json"
    found: dict[str, dict[str, Any]] = json.loads(file.read_text()) if names else {}
    for name in names or PLANS:
        model, *mesh = PLANS[name]
        for method, flags in METHODS.items():
            print(name, method, flush=True)
            report = planned([*COMMON, "--model", str(CONFIGS / model), *mesh, *flags])
            found.setdefault(name, {})[method] = {**report, "model": model}
            write_json(file, found)
    write_text(RESULTS / "plans.md", table(found))


def planned(flags: list[str]) -> dict[str, Any]:
    """The report, or why there is none: a chip that has not the memory."""
    command = [sys.executable, "-m", "lora_mini_jax.cli", "plan", "--json", *flags]
    ran = subprocess.run(command, capture_output=True, text=True)
    if "not enough memory" in ran.stderr:
        return {"error": ran.stderr.strip().splitlines()[-1].partition("(")[2].partition("):")[0]}
    ran.check_returncode()
    return json.loads(ran.stdout)


def table(found: dict[str, dict[str, Any]]) -> str:
    """A markdown table; GiB on each device."""
    columns = ("params", "adapter", "optimizer", "temporaries", "total")
    lines = ["| plan | method | trained | " + " | ".join(columns) + " | exchanged |",
             "|---|---|---:|" + "---:|" * (len(columns) + 1)]  # fmt: skip
    for name, methods in found.items():
        for method, report in methods.items():
            if "error" in report:
                blank = " | " * (len(columns) + 1)
                lines.append(f"| {name} | {method} | does not fit{blank} |")
                continue
            sizes = [report["bytes_per_device"][column] for column in columns]
            sizes.append(sum(report["exchanged_bytes"].values()))
            cells = [name, method, f"{report['trainable']:,}", *(f"{s / 2**30:.2f}" for s in sizes)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
