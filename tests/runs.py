"""What the tests of whole runs share: a tiny model, a data file, and options for them."""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lora_mini_jax.data import Batches
from lora_mini_jax.models import Llama, LlamaConfig, save
from lora_mini_jax.options import Finetune

WORDS = ("red", "green", "blue", "grey", "black", "white", "pink", "gold")


def write_model(folder: Path, seed: int = 0, **changes: int) -> Path:
    """A random Llama of one layer with a byte-level tokenizer, in Hugging Face layout."""
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 128}
    given: dict[str, Any] = {**sizes, **heads, **changes}
    config = LlamaConfig(**given)
    model = Llama(config)
    params = model.init(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]
    files = folder.with_name(folder.name + "-tokenizer")
    files.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(files / "tokenizer.json"))
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    (files / "tokenizer_config.json").write_text(json.dumps(special))
    save(folder, model, params, tokenizer_from=files)
    return folder


def write_data(path: Path, n: int = 48) -> Path:
    """Records with a prompt and a completion that follows from it."""
    rows = [{"q": f"say {WORDS[i % 8]} {i}", "a": WORDS[i % 8]} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def interrupted() -> None:
    """What stops a run at once."""
    raise KeyboardInterrupt


@contextmanager
def stopped_at(step: int, stop: Callable[[], None] = interrupted) -> Generator[None]:
    """Runs are stopped when they ask for the batch of this step."""
    batch = Batches.batch

    def stopping(self: Batches, i: int, *part: slice) -> Any:
        if self.shuffle and i == step:  # it is evaluated in the rows' own order
            stop()
        return batch(self, i, *part)

    with mock.patch.object(Batches, "batch", stopping):
        yield


def options(folder: Path, **changes: Any) -> Finetune:
    """A run of seconds; makes the model and the data in ``folder`` where they are not there yet."""
    model, data = folder / "model", folder / "data.jsonl"
    if not model.exists():
        write_model(model)
    if not data.exists():
        write_data(data)
    given: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "prompt_field": "q",
        "completion_field": "a",
        "output_dir": str(folder / "run"),
        "settings": ("rank=2", "a=8", "b=8", "outer_init=orthogonal"),
        "max_length": 64,
        "batch_size": 4,
        "max_steps": 6,
        "max_new_tokens": 4,
        "samples": 1,
    }
    return Finetune(**{**given, **changes})
