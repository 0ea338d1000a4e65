"""What a step of large models would take: ``lora-mini plan`` of some, side by side.

    python -m experiments.plans

Writes ``results/plans.json`` and a table, ``results/plans.md``. Needs no weights and no device; a
minute or two for each model.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lora_mini_jax.files import write_json, write_text

HERE = Path(__file__).parent
COMMON = ["--dtype", "bfloat16", "--remat", "full", "--scan-layers", "--max-length", "2048"]
MINI = ["--method", "lora-mini", "--rank", "8", "--a", "64", "--b", "64"]
PLANS = {
    "Llama-3-8B on one device": ["llama-3-8b", "--mesh", "data=1", "--batch-size", "2"],
    "Llama-3-8B on 4 x 4": ["llama-3-8b", "--mesh", "fsdp=4,tensor=4", "--batch-size", "16"],
    "Llama-3-70B on 64": ["llama-3-70b", "--mesh", "fsdp=16,tensor=4", "--batch-size", "16"],
}
METHODS = {"LoRA-Mini r=8 a=b=64": MINI, "LoRA r=16": ["--method", "lora", "--rank", "16"],
           "full": ["--method", "full"]}  # fmt: skip


def main() -> None:
    """Every plan with every method."""
    found: dict[str, dict[str, Any]] = {}
    for name, (model, *mesh) in PLANS.items():
        for method, flags in METHODS.items():
            print(name, method, flush=True)
            command = [sys.executable, "-m", "lora_mini_jax.cli", "plan", "--json", *COMMON]
            command += ["--model", str(HERE / "configs" / model), *mesh, *flags]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found.setdefault(name, {})[method] = {**json.loads(out), "model": model}
            write_json(HERE / "results" / "plans.json", found)
    write_text(HERE / "results" / "plans.md", table(found))


def table(found: dict[str, dict[str, Any]]) -> str:
    """A markdown table; GiB on each device."""
    columns = ("params", "adapter", "optimizer", "temporaries", "total")
    lines = ["| plan | method | trained | " + " | ".join(columns) + " | exchanged |",
             "|---|---|---:|" + "---:|" * (len(columns) + 1)]  # fmt: skip
    for name, methods in found.items():
        for method, report in methods.items():
            sizes = [report["bytes_per_device"][column] for column in columns]
            sizes.append(sum(report["exchanged_bytes"].values()))
            cells = [name, method, f"{report['trainable']:,}", *(f"{s / 2**30:.2f}" for s in sizes)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
