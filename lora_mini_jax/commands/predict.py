"""Classes or numbers of texts, by a model with an adapter that was trained to tell them."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_mini_jax import linen, sharding
from lora_mini_jax.data import Batches, load_tokenizer, read_records
from lora_mini_jax.data.data_sets import is_one_split
from lora_mini_jax.errors import UserError
from lora_mini_jax.files import write_text, writing
from lora_mini_jax.options import Predict
from lora_mini_jax.runs.run import Log
from lora_mini_jax.tasks.devices import Devices
from lora_mini_jax.tasks.head import Head
from lora_mini_jax.tasks.label import check_rows, encode
from lora_mini_jax.tasks.trained import Trained


def run_predict(options: Predict, say: Log = print) -> list[dict[str, Any]]:
    """Write a line of JSON for each record, in their order; returns what is in them.

    Of a classification ``{"index": 0, "label": "yes", "probabilities": {"no": 0.2, "yes": 0.8}}``,
    of a regression ``{"index": 0, "value": 3.2}``.

    Raises:
        UserError: an adapter that was trained for language, or does not fit the model; data that
            cannot be read; a file that cannot be written, or is of the data.
    """
    devices = Devices.on(options.mesh, options.batch_size)
    check_output(Path(options.output), Path(options.data).expanduser())
    trained = Trained.read(options.adapter, options.model)
    head = trained.head
    if head is None:
        raise UserError(f"{options.adapter} was trained for language: give an adapter of finetune "
                        "--task classification or regression, or use generate")  # fmt: skip
    tokenizer = load_tokenizer(trained.base_folder)
    check_split(options)
    records = read_records(options.data, split=options.split)
    if missing := [field for field in head.text_fields if field not in records[0]]:
        raise UserError(f"{options.data} has no field {', '.join(missing)}, only "
                        f"{', '.join(map(str, records[0]))}: name the fields as in the adapter's "
                        f"training, {', '.join(head.text_fields)}")  # fmt: skip
    module = head.module(trained.base_folder)
    unknown = np.zeros(len(records), np.int32)
    rows, cut = encode(records, unknown, head, module.config, tokenizer, options.data)  # type: ignore[attr-defined]
    check_rows(module, tokenizer, rows)
    model, params, adapter = trained.load(options.allow_different_base, options.dtype, devices)
    size = devices.batch_size(options.batch_size, len(records))
    batches = Batches(rows, size, seed=0, shuffle=False)
    apply = jax.jit(linen.adapt(model, rows=sharding.of_rows(params)))
    names = ("tokens", "segment_ids", "type_ids")
    each = (devices.batch(batches, i) for i in range(len(batches)))
    logits = [apply(params, adapter, *(batch[name] for name in names)) for batch in each]
    kept = np.concatenate(jax.device_get(logits))[: len(records)]
    lines = [{"index": i, **prediction(head, row)} for i, row in enumerate(kept)]
    write_text(options.output, "".join(f"{json.dumps(line)}\n" for line in lines))
    if cut:
        say(f"{cut} texts were cut at {head.max_length} tokens")
    say(f"{len(lines)} predictions: {options.output}")
    return lines


def check_split(options: Predict) -> None:
    """Raise `UserError` where a split is asked for of data that has none to choose."""
    data = Path(options.data).expanduser()
    said = "is a file" if data.is_file() else "was saved as one" if is_one_split(data) else ""
    if options.split != Predict.split and said:
        raise UserError(f"--split {options.split} is for data that has splits, and {options.data} "
                        f"{said}: leave it out")  # fmt: skip


def check_output(output: Path, data: Path) -> None:
    """Raise `UserError` unless ``output`` may be written: all that can be known before the work."""
    with writing(output):
        if output.is_dir():
            raise UserError(f"--output {output} is a folder: name a file to write to")
        if not output.parent.is_dir():
            raise UserError(f"--output {output}: there is no folder {output.parent}: make it first")
        of_data = data.resolve() in (output.resolve(), *output.resolve().parents)
        if of_data and output.exists():
            raise UserError(f"--output {output} is a file of --data: name another to write to")
        if output.exists() and not is_predictions(output):
            raise UserError(f"--output {output} exists and holds no predictions: name another file")


def is_predictions(path: Path) -> bool:
    """Whether a file is empty or begins as those that are written here, and may be replaced."""
    with path.open("rb") as file:
        start = file.readline(10_000)
    try:
        first = json.loads(start or '{"index": 0}')
    except ValueError:
        return False
    return isinstance(first, dict) and first.get("index") == 0


def prediction(head: Head, logits: np.ndarray) -> dict[str, Any]:
    """What one row's logits (labels,) say."""
    if head.task == "regression":
        return {"value": float(logits[0])}
    powers = np.exp(logits.astype(np.float64) - logits.max())
    chances = dict(zip(head.labels, (powers / powers.sum()).tolist(), strict=True))
    return {"label": head.labels[int(logits.argmax())], "probabilities": chances}
