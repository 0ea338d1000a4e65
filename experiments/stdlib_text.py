"""The standard library's source as folders of text, and the loss of a model on one of them."""

import shutil
import sysconfig
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.pretrain_base import corpus
from lora_mini_jax.data import (
    Batches,
    encode_texts,
    find_texts,
    load_tokenizer,
    pack,
    thinned,
    token_loss,
)
from lora_mini_jax.files import new_folder
from lora_mini_jax.models import load

REPORTED = 20_000
"""Tokens that a loss is taken on, evenly spread over the files."""


def texts(work: Path) -> dict[str, Path]:
    """Folders of files to train on, to tune on and to report on."""
    (train, held_out), root = corpus(), sysconfig.get_paths()["stdlib"]
    parts = {"train": train, "tuning": held_out[::2], "reporting": held_out[1::2]}
    for name, files in parts.items():
        if not (work / name).exists():
            with new_folder(work / name) as folder:
                for path in files:
                    shutil.copyfile(path, folder / ".".join(path.relative_to(root).parts))
    return {name: work / name for name in parts}


def held_out_loss(model_folder: Path, texts_folder: Path, length: int) -> float:
    """Nats per token of the files of a folder, `REPORTED` tokens evenly spread over them."""
    model, params = load(model_folder)
    files = find_texts([texts_folder], [".py"])
    pieces = encode_texts(files, load_tokenizer(model_folder), length)
    pieces = thinned(pieces, REPORTED)

    @jax.jit
    def summed(params: Any, batch: Any) -> Any:
        inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
        logits: Any = model.apply({"params": params}, *inputs)
        return token_loss(logits, batch)

    batches = Batches(pack(pieces, length), 16, 0).eval_batches()
    total, number = np.sum(np.asarray([summed(params, b) for b in batches], np.float64), axis=0)
    return float(total / number)
