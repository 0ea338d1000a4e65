"""Pre-train the small Llama that ships inside the package (``lora_mini_jax/base``).

    python -m experiments.pretrain_base --out lora_mini_jax/base

The corpus is the source of the Python standard library this runs on (its tests, and the
``pydoc_data`` topics that the demo adapts to, are left out). One file in fifty is held out, by a
hash of its name. Writes the model in Hugging Face layout (bfloat16), and the loss curve to
``experiments/results/pretrain_base.json``. About half an hour on two cores at the default size.
"""

import json
import sysconfig
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from lora_mini_jax.files import write_json
from lora_mini_jax.models import Llama, LlamaConfig, save

SPECIAL = ["<pad>", "<s>", "</s>"]
LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "pydoc_data", "__pycache__")
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """Settings of the run; the defaults made the model that ships."""

    out: Path
    """Folder for the model in Hugging Face layout; must not exist."""
    steps: int = 2200
    batch: int = 8
    length: int = 256
    lr: float = 3e-3
    seed: int = 0
    hidden: int = 256
    layers: int = 3
    vocab: int = 2048


def main(options: Options) -> None:
    """Tokenise, train, save, report."""
    train_files, valid_files = corpus()
    tokenizer = train_tokenizer([path.read_text("utf-8") for path in train_files], options.vocab)
    train, valid = encode(tokenizer, train_files), encode(tokenizer, valid_files)
    model = Llama(config(options))
    params, curve = fit(model, train, valid, options)
    write_tokenizer(tokenizer, work := options.out.with_suffix(".tokenizer"))
    save(options.out, model, params, dtype=jnp.bfloat16, tokenizer_from=work)
    for file in work.iterdir():
        file.unlink()
    work.rmdir()
    write_json(
        RESULTS / "pretrain_base.json",
        {
            "command": "python -m experiments.pretrain_base --out lora_mini_jax/base",
            "options": {**vars(options), "out": str(options.out)},
            "python": sysconfig.get_python_version(),
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "train_tokens_in_corpus": len(train),
            "valid_tokens_in_corpus": len(valid),
            "curve": curve,
        },
    )


def corpus() -> tuple[list[Path], list[Path]]:
    """The standard library's modules, those for training and those held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path for path in root.rglob("*.py") if not set(path.relative_to(root).parts) & set(LEFT_OUT)
    )
    readable = [path for path in files if _is_utf8(path)]
    held_out = {p for p in readable if zlib.crc32(str(p.relative_to(root)).encode()) % 50 == 0}
    return [p for p in readable if p not in held_out], sorted(held_out)


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """A byte-level BPE: every text can be encoded, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """``tokenizer.json`` and its config, as Hugging Face lays them out."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": SPECIAL[0], "bos_token": SPECIAL[1], "eos_token": SPECIAL[2]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **names}, indent=2))


def encode(tokenizer: Tokenizer, files: list[Path]) -> np.ndarray:
    """All files as one stream of ids, int32, each file begun by ``<s>`` and ended by ``</s>``."""
    encoded = tokenizer.encode_batch([path.read_text("utf-8") for path in files])
    return np.concatenate([np.asarray([1, *e.ids, 2], np.int32) for e in encoded])


def config(options: Options) -> LlamaConfig:
    """The shape of the model."""
    return LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=2 * options.length,
        pad_token_id=0,
    )


def fit(model: Llama, train: np.ndarray, valid: np.ndarray, options: Options):
    """Train every parameter with AdamW; returns them and the loss curve."""
    warmup = options.steps // 20
    rate = optax.warmup_cosine_decay_schedule(0, options.lr, warmup, options.steps)
    adamw = optax.adamw(rate, b2=0.95, weight_decay=0.1)
    tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)

    def loss_fn(params: Any, tokens: Any) -> jax.Array:
        logits: Any = model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    evaluate = jax.jit(loss_fn)
    params = model.init(jax.random.key(options.seed), jnp.zeros((1, 8), jnp.int32))["params"]
    state, rng, curve = tx.init(params), np.random.default_rng(options.seed), []
    ends = len(valid) - options.length - 1
    fixed = windows(valid, np.linspace(0, ends, 64).astype(int), options.length)
    started = time.time()
    for i in (bar := tqdm(range(options.steps), unit="step")):
        starts = rng.integers(0, len(train) - options.length - 1, options.batch)
        params, state, loss = step(params, state, windows(train, starts, options.length))
        if (i + 1) % 100 == 0 or i + 1 == options.steps:
            row = {"step": i + 1, "loss": float(loss), "valid_loss": float(evaluate(params, fixed))}
            curve.append({**row, "seconds": round(time.time() - started)})
            bar.set_postfix(row)
    return params, curve


def windows(stream: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """``(len(starts), length + 1)`` ids, so that inputs and targets are ``length`` each."""
    return stream[starts[:, None] + np.arange(length + 1)]


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text("utf-8")
    except UnicodeDecodeError:
        return False
    return True


if __name__ == "__main__":
    main(tyro.cli(Options))
