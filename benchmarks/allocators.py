"""What memory that is kept after it is freed is worth to a run on CPUs, and what it costs.

    python -m benchmarks.allocators [--preload libtcmalloc_minimal.so.4] [--json PATH]

Every row is ``lora-mini finetune`` of a random Llama, in a process of its own, in turns: as it
comes; with glibc told to keep what is freed; and with each library of ``--preload`` in the place of
glibc's allocator. A step's time is the median that the run itself reports; page faults and the most
resident memory are what the system counts for the whole process. Ten minutes on two quiet cores.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import tyro
from tqdm import tqdm

from benchmarks.llama import drawn
from benchmarks.machine import about, allocator
from benchmarks.row import Options as Size
from benchmarks.row import in_turn
from lora_mini_jax.files import read_object, write_json
from lora_mini_jax.models import save
from lora_mini_jax.options.adapter import BASE

KEPT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)}
"""No arenas of threads' own, which map large blocks whatever is said; no block mapped for itself;
none given back."""
WORDS = ("one", "two", "three", "four", "five", "six", "seven")


@dataclass(frozen=True)
class Options:
    """How often, and what is tried."""

    rounds: int = 3
    steps: int = 12
    layers: int = 2
    width: int = 1024
    preload: tuple[str, ...] = ()
    """Allocators to put in the place of glibc's, as ``LD_PRELOAD`` takes them."""
    json: Path | None = None


def main(options: Options) -> None:
    """Run every row, print the table, write the JSON."""
    settings = {"glibc": {}, "glibc, told to keep": KEPT}
    settings |= {library: {"LD_PRELOAD": library} for library in options.preload}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in settings}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), Size(layers=options.layers, width=options.width))
        for turn in tqdm(range(options.rounds), "measure", unit="round"):
            for name in in_turn(settings, turn):
                runs[name].append(run(Path(folder), settings[name], options.steps))
    steps = {name: [each["step_ms"] for each in found] for name, found in runs.items()}
    rows = []
    for name, found in runs.items():
        ratios = [own / first for own, first in zip(steps[name], steps["glibc"], strict=True)]
        medians = {key: median(each[key] for each in found) for key in found[0]}
        rows.append({"name": name, "environment": settings[name], "ratio": median(ratios),
                     "ratios": ratios, **medians})  # fmt: skip
        print(f"{name:28} {medians['step_ms']:7.0f} ms a step, {median(ratios):.2f} of glibc's; "
              f"{medians['page_faults']:12,.0f} page faults, "
              f"{medians['resident_bytes'] / 1e9:.2f} GB")  # fmt: skip
    if options.json:
        size = {"layers": options.layers, "width": options.width, "batch": 4, "length": 256}
        how = {"steps": options.steps, "rounds": options.rounds}
        write_json(options.json, {"rows": rows, **size, **how, **about()})


def make(folder: Path, size: Size) -> None:
    """A model with a tokenizer, and text for it."""
    model, params, _ = drawn(size)
    save(folder / "model", model, params, tokenizer_from=BASE)
    words = Random(0)
    rows = [{"text": " ".join(words.choices(WORDS, k=100))} for _ in range(200)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, own: dict[str, str], steps: int) -> dict[str, Any]:
    """A run with these settings and no others."""
    out = Path(tempfile.mkdtemp(dir=folder))
    given = {"model": folder / "model", "data": folder / "text.jsonl", "output-dir": out,
             "max-steps": steps, "log-every": 1, "max-length": 256, "batch-size": 4, "rank": 8,
             "a": 64, "b": 64, "max-valid-examples": 8, "samples": 0}  # fmt: skip
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    there = {name: value for name, value in os.environ.items() if name not in allocator()}
    command = [sys.executable, "-m", "lora_mini_jax.cli", "finetune", *words]
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(command, env=there | own, stdout=log, stderr=log)
        _, process.returncode, usage = os.wait4(process.pid, 0)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(log.read())
    return {
        "step_ms": 1e3 * read_object(out / "summary.json")["step_seconds"],
        "page_faults": usage.ru_minflt,
        "resident_bytes": usage.ru_maxrss * 1024,
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
