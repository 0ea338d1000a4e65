"""What the tests of labelled texts share: a tiny encoder, data with a rule, and options."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lora_mini_jax.models import Bert, BertConfig, Roberta, RobertaConfig, save
from lora_mini_jax.options import Finetune

WORDS = ("the", "day", "was", "sun", "rain", "sea", "wind", "good", "bad")


def write_encoder(folder: Path, kind: str = "bert", positions: int = 24) -> Path:
    """A random encoder of one layer and no head, with a word tokenizer, in Hugging Face layout."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = {word: i for i, word in enumerate([*special, *WORDS])}
    sizes: dict[str, Any] = {
        "vocab_size": len(vocab), "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.3,
        "pad_token_id": 1, "max_position_embeddings": positions,
    }  # fmt: skip
    bert = kind == "bert"
    model = (
        Bert(BertConfig(**sizes)) if bert else Roberta(RobertaConfig(**sizes, type_vocab_size=1))
    )
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    files = folder.with_name(f"{folder.name}-tokenizer")
    files.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    second = "$B:1 </s>:1" if bert else "</s>:0 $B:0 </s>:0"
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=f"<s>:0 $A:0 </s>:0 {second}",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )  # fmt: skip
    tokenizer.save(str(files / "tokenizer.json"))
    save(folder, model, params, tokenizer_from=files)
    return folder


def rows(n: int, number: bool = False) -> list[dict[str, Any]]:
    """Pairs whose label follows from one word of the second text."""
    found = []
    for i in range(n):
        good = (i * 7) % 3 == 0
        first = f"the {WORDS[3 + i % 4]} was the {WORDS[3 + i // 4 % 4]}"
        second = f"{WORDS[1 + i % 5]} {'good' if good else 'bad'} {WORDS[i % 6]}"
        label = (2.0 if good else -1.0) if number else ("yes" if good else "no")
        found.append({"a": first, "b": second, "label": label})
    return found


def write_rows(path: Path, records: list[dict[str, Any]]) -> Path:
    """Records as a jsonl file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def options(folder: Path, **changes: Any) -> Finetune:
    """A run of seconds; makes model and data in ``folder`` where they are not there yet."""
    if not (folder / "bert").exists():
        write_encoder(folder / "bert")
        write_rows(folder / "train.jsonl", rows(28))
        write_rows(folder / "valid.jsonl", rows(61)[50:])
    given: dict[str, Any] = {
        "model": str(folder / "bert"),
        "data": str(folder / "train.jsonl"),
        "valid": str(folder / "valid.jsonl"),
        "task": "classification",
        "text_fields": ("a", "b"),
        "output_dir": str(folder / "run"),
        "method": "lora",
        "settings": ("rank=2",),
        "learning_rate": 0.03,
        "max_length": 24,
        "batch_size": 8,
        "epochs": 6.0,
        "save_every": 5,
    }
    return Finetune(**{**given, **changes})
