"""What the tests of sources and targets share: a tiny T5, pairs with a rule, and options."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, models, pre_tokenizers

from lora_mini_jax.models import T5, T5Config, save
from lora_mini_jax.options import Finetune

WORDS = ("red", "green", "blue", "grey", "black", "white", "pink", "gold")


def write_t5(folder: Path, **changes: Any) -> Path:
    """A random T5 of one layer a half with a word tokenizer, in Hugging Face layout."""
    vocab = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", "say", *WORDS))}
    sizes: dict[str, Any] = {
        "vocab_size": len(vocab), "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1,
        "num_heads": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }  # fmt: skip
    model, one = T5(T5Config(**{**sizes, **changes})), jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), one, one)["params"]
    files = folder.with_name(f"{folder.name}-tokenizer")
    files.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(files / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    (files / "tokenizer_config.json").write_text(json.dumps(special))
    save(folder, model, params, tokenizer_from=files)
    return folder


def pairs(n: int) -> list[dict[str, Any]]:
    """Sources of which one word is the target."""
    return [{"prompt": " ".join(["say", WORDS[i * 3 % 8], *["say"] * (i % 3)]),
             "completion": WORDS[i * 3 % 8]} for i in range(n)]  # fmt: skip


def write_rows(path: Path, records: list[dict[str, Any]]) -> Path:
    """Records as a jsonl file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def options(folder: Path, **changes: Any) -> Finetune:
    """A run of seconds; makes model and data in ``folder`` where they are not there yet."""
    if not (folder / "t5").exists():
        write_t5(folder / "t5")
        write_rows(folder / "pairs.jsonl", pairs(27))
    given: dict[str, Any] = {
        "model": str(folder / "t5"),
        "data": str(folder / "pairs.jsonl"),
        "valid": str(folder / "pairs.jsonl"),
        "output_dir": str(folder / "run"),
        "method": "lora",
        "settings": ("rank=4",),
        "learning_rate": 0.02,
        "max_length": 12,
        "batch_size": 8,
        "max_steps": 60,
        "epochs": 60.0,
        "save_every": 10,
        "max_new_tokens": 3,
    }
    return Finetune(**{**given, **changes})
