"""The options of pre-training: the model's shape, the text, and the run."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from lora_mini_jax.options.adapter import BASE
from lora_mini_jax.options.numbers import COUNT, SHARE
from lora_mini_jax.options.training import Training

FromScratch = Literal["full", "lora", "relora", "switchlora"]
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
"""The sizes of a Llama that are options, under the names they have in config.json."""


@dataclass(frozen=True)
class Pretrain(Training):
    """Train a Llama from scratch. After an interruption, run the same command to resume.

    The method adapts every linear kernel of attention and MLP; embeddings, norms, biases and the
    output head are trained whole beside it.
    """

    allowed: ClassVar[dict[str, str]] = {
        **Training.allowed,
        **dict.fromkeys((*SIZES, "steps", "max_valid_tokens"), COUNT),
        "held_out": SHARE,
    }

    method: FromScratch = "full"
    """How the linear kernels are trained; those that need a trained model are not offered."""
    data: tuple[str, ...] = ()
    """Text files, and folders that are searched for them; every file is one text."""
    valid: tuple[str, ...] = ()
    """Held-out files and folders; never trained on, even where --data holds them too."""
    held_out: float = 0.02
    """Without --valid: the share of the files that is held out, chosen by their names."""
    suffixes: tuple[str, ...] = (".txt", ".py")
    """Which files of a folder are text."""
    max_valid_tokens: int | None = None
    """Evaluate on about this many held-out tokens, from all files alike; by default on all."""
    output_dir: str = "runs/pretrain"
    """The run folder: config, metrics, checkpoints, model and report."""

    max_length: int = 256
    """Tokens in a row; at most the positions of the model."""
    eval_every: int | None = None
    """Steps between two evaluations; by default only before and after."""

    tokenizer: str = BASE
    """A folder that holds tokenizer.json; by default the package's own, of 2048 ids."""
    shape: str = BASE
    """A folder that holds the config.json of a Llama; weights in it are not read. The sizes below,
    where they are given, go before its own."""
    vocab_size: int | None = None
    """Ids in the vocabulary; at least as many as the tokenizer has."""
    hidden_size: int | None = None
    """The width."""
    intermediate_size: int | None = None
    """The width within the MLP."""
    num_hidden_layers: int | None = None
    """Layers."""
    num_attention_heads: int | None = None
    """Heads; the width is a multiple of them."""
    num_key_value_heads: int | None = None
    """Heads of keys and values, of which the other heads are a multiple."""

    steps: int = 1000
    """How many updates; a method whose own schedule has a length (total_steps) is told of it."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW. After each restart of ReLoRA it rises to the schedule anew."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay: on the factors of the method, and on weights trained whole."""

    def sizes(self) -> dict[str, int]:
        """The sizes that were given."""
        return {name: value for name in SIZES if (value := getattr(self, name)) is not None}
