"""What data costs a run: making the rows, finding them again, and waiting for batches.

    python -m benchmarks.data [--json PATH] [--megabytes 64]

Writes a text file of random words in records of random lengths and, in a process each: makes its
rows (tokenised, packed, on disk), finds them again, and takes steps of a small model on them while
batches are made in the background. ``grown`` is how far a process's own memory rose meanwhile, in
bytes; pages of mapped files, which the system may take back, are not in it (Linux: RssAnon). Trust
``wait_share`` before seconds. ``make_seconds`` is what a batch costs with nothing beside it: on any
device, data keeps up as long as that is less than a step.
"""

import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro

from lora_mini_jax.files import write_json


@dataclass(frozen=True)
class Options:
    """How much of what, and where to."""

    json: Path | None = None
    """Where to write the rows; its folder is made."""
    folder: Path | None = None
    """Where to make the files; by default a temporary place."""
    megabytes: int = 64
    """Of text."""
    length: int = 512
    """Tokens in a row."""
    batch: int = 8
    """Rows in a batch."""
    steps: int = 40
    width: int = 256
    """Of the model that takes the steps."""
    layers: int = 2


def write_text(path: Path, size: int) -> None:
    """About ``size`` bytes of records with a text of 5 to 400 words each."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, 4096)
    words = ["".join(map(chr, rng.integers(97, 123, n))) for n in lengths]
    with path.open("w") as file:
        while file.tell() < size:
            chosen = rng.integers(0, len(words), rng.integers(5, 400))
            file.write(json.dumps({"text": " ".join(words[i] for i in chosen)}) + "\n")


class Growth:
    """How far this process's own memory rises in a block, in bytes: ``most``."""

    most = 0

    def __enter__(self) -> "Growth":
        self._before, self._done = own_memory(), threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.most = max(self.most, own_memory() - self._before)


def own_memory() -> int:
    """What this process has for itself; pages of mapped files are not among it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def data(o: Options, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Batches, and what it cost to come by them."""
    from lora_mini_jax.data import Batches, load_tokenizer
    from lora_mini_jax.models.hub import load_decoder_config
    from lora_mini_jax.options import Finetune
    from lora_mini_jax.options.adapter import BASE
    from lora_mini_jax.tasks.data import read_rows
    from lora_mini_jax.tasks.language import LanguageTask

    given = Finetune(data=str(folder / "text.jsonl"), max_length=o.length,
                     overlong="truncate", cache_dir=str(folder / "rows"))  # fmt: skip
    tokenizer = load_tokenizer(BASE)
    tokenizer.encode_batch(["warm"])
    recipe = LanguageTask.recipe(given, load_decoder_config(BASE), tokenizer, Path(BASE))
    began = time.perf_counter()
    with Growth() as growth:
        part, _ = read_rows(given, recipe)
    seconds = time.perf_counter() - began
    batches = Batches(part.rows, o.batch, seed=0)
    return batches, {"rows": len(part.rows.tokens), "seconds": seconds, "grown": growth.most}


def making(o: Options, folder: Path) -> dict[str, Any]:
    """Rows that are not there yet, and how many tokens they hold."""
    batches, found = data(o, folder)
    tokens = sum(int(np.count_nonzero(b["segment_ids"])) for b in batches.eval_batches())
    stored = sum(f.stat().st_size for f in (folder / "rows").rglob("*") if f.is_file())
    per_second = tokens / found["seconds"]
    return found | {"tokens": tokens, "tokens_per_second": per_second, "bytes": stored}


def finding(o: Options, folder: Path) -> dict[str, Any]:
    """Rows that are there, and what each of their batches costs to make, one after the other."""
    batches, found = data(o, folder)
    took = []
    for step in range(min(len(batches), 200)):
        began = time.perf_counter()
        batches.batch(step)
        took.append(time.perf_counter() - began)
    return found | {"make_seconds": median(took)}


def stepping(o: Options, folder: Path) -> dict[str, Any]:
    """Steps on batches that are made ahead, and the share of their time that one waits."""
    import jax
    import jax.numpy as jnp
    import optax

    from lora_mini_jax import LoRAMini, TrainState, init, linen, make_train_step
    from lora_mini_jax.data import next_tokens, summed
    from lora_mini_jax.data.prefetch import prefetched
    from lora_mini_jax.models import Llama, LlamaConfig
    from lora_mini_jax.tasks.devices import Devices

    model = Llama(LlamaConfig(
        vocab_size=2048, hidden_size=o.width, intermediate_size=2 * o.width,
        num_hidden_layers=o.layers, num_attention_heads=4, max_position_embeddings=o.length,
    ))  # fmt: skip
    batches, found = data(o, folder)
    rows = jnp.zeros((1, 8), jnp.int32)
    params = model.init(jax.random.key(0), rows)["params"]
    apply = linen.adapt(model)

    def loss(params: Any, adapter: Any, batch: Any, key: jax.Array) -> jax.Array:
        inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
        scores = apply(params, adapter, *inputs, labels=next_tokens(batch))
        total, number = summed(scores.losses, batch)
        return total / number

    adapter = init(params, LoRAMini(rank=4, a=16, b=16), linen.targets(model, params, rows))
    tx = optax.adam(1e-3)
    step: Any = make_train_step(loss, tx)
    state, waits, began = TrainState.create(adapter, tx), 0.0, 0.0
    with prefetched(partial(Devices().batch, batches), 0, o.steps + 1) as coming:
        for i in range(o.steps + 1):
            asked = time.perf_counter()
            batch = next(coming)
            waits += time.perf_counter() - asked
            state, metrics = step(state, params, batch)
            # The device is waited for, so that no wait for data hides behind its work.
            jax.block_until_ready(metrics)
            if i == 0:  # compiled
                waits, began = 0.0, time.perf_counter()
    seconds = time.perf_counter() - began
    return {
        "device": jax.devices()[0].device_kind,
        "step_seconds": seconds / o.steps,
        "wait_seconds": waits / o.steps,
        "wait_share": waits / seconds,
        "grown": found["grown"],
    }


def main(options: Options) -> dict[str, Any]:
    """Measure all three, print them, and write them where asked."""
    place = Path(tempfile.mkdtemp(dir=options.folder, prefix="data-benchmark-"))
    try:
        write_text(place / "text.jsonl", options.megabytes * 1_000_000)
        rows = []
        for run in (making, finding, stepping):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append({"name": run.__name__, **pool.apply(run, (options, place))})
            print(json.dumps(rows[-1]), flush=True)
    finally:
        shutil.rmtree(place)
    given = asdict(options) | {"json": None, "folder": None}
    machine = {"cpus": os.cpu_count(), "python": platform.python_version()}
    found = {"options": given, **machine, "rows": rows}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, found)
    return found


if __name__ == "__main__":
    main(tyro.cli(Options))
