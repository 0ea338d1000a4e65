"""What quantising a base costs before anything is trained: held-out loss, and error of the kernels.

    python -m experiments.quantized_base NAME --models MODEL_DIR ... --text FILE

Writes ``results/quantized_NAME.json``: for each model and each form of its linear kernels the mean
loss in nats per token of the text, and the kernels' root mean square error relative to their own.
Kept are ``stories260K`` (that model on TinyStories) and ``python`` (the package's base on a file of
Python's library).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from lora_mini_jax import linen, select
from lora_mini_jax.data import Batches, encode_texts, find_texts, load_tokenizer, pack, token_loss
from lora_mini_jax.files import write_json
from lora_mini_jax.models import load
from lora_mini_jax.quantized import quantize
from lora_mini_jax.tree import dense, flatten


@dataclass(frozen=True)
class Options:
    """The bases and the text."""

    name: tyro.conf.Positional[str]
    """What the results' file is called."""
    models: tuple[Path, ...]
    """Folders of Llamas."""
    text: Path
    """What their loss is taken on."""
    length: int = 256
    """Tokens of a row."""
    rows: int = 64
    """Rows, from the start of the text."""
    out: Path = Path(__file__).parent / "results"
    """The folder of the results."""


def main(options: Options) -> None:
    """Measure and write."""
    found = {folder.name: measure(folder, options) for folder in options.models}
    about = {"text": options.text.name, "rows": options.rows, "length": options.length}
    write_json(options.out / f"quantized_{options.name}.json", {**about, "models": found})


def measure(folder: Path, options: Options) -> dict[str, Any]:
    """``{form: {loss, error}}`` of one model."""
    model, params = load(folder)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    chosen = select(linen.targets(model, params, tokens), "all-linear")
    texts = find_texts((str(options.text),), (options.text.suffix,))
    rows = encode_texts(texts, load_tokenizer(folder), options.length)[: options.rows]
    batches = list(Batches(pack(rows, options.length), 8, seed=0).eval_batches())

    @jax.jit
    def loss(params: Any, batch: Any) -> Any:
        inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
        return token_loss(model.apply({"params": params}, *inputs), batch)

    forms = {"float32": params, "int8": quantize(params, chosen, "int8"),
             "nf4": quantize(params, chosen, "nf4")}  # fmt: skip
    found = {}
    for name, form in forms.items():
        total, number = np.sum([loss(form, batch) for batch in batches], axis=0)
        found[name] = {"loss": float(total / number), "error": error(params, form, chosen)}
        print(folder.name, name, found[name], flush=True)
    return found


def error(params: Any, form: Any, chosen: Any) -> float:
    """Of all chosen kernels together: the error's root mean square over theirs."""
    before, after = flatten(params), flatten(form)
    pairs = [(before[t.path], dense(after[t.path])) for t in chosen]
    off = sum(float(jnp.sum((a - b) ** 2)) for a, b in pairs)
    return (off / sum(float(jnp.sum(a**2)) for a, _ in pairs)) ** 0.5


if __name__ == "__main__":
    main(tyro.cli(Options))
