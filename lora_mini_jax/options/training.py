"""The options of every training run: how it trains, and where it keeps what it found."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from lora_mini_jax.errors import UserError, flag
from lora_mini_jax.options.adapter import MethodOptions
from lora_mini_jax.options.numbers import (
    COUNT,
    LIMIT,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    wrong_numbers,
)
from lora_mini_jax.settings.choices import Remat


@dataclass(frozen=True)
class Training(MethodOptions):
    """What fine-tuning and pre-training share.

    Raises:
        UserError: numbers out of range, all of them in one message; a method's wrong setting.
    """

    allowed: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("max_length", "batch_size", "accumulate", "log_every", "eval_every", "save_every"),
            COUNT,
        ),
        "learning_rate": POSITIVE,
        "max_grad_norm": LIMIT,
        "weight_decay": NOT_NEGATIVE,
        "warmup_ratio": SHARE,
        "seed": SEED,
    }
    """What the numbers may be; a subclass adds its own."""

    output_dir: str = "runs/training"
    """The run folder: config, metrics, checkpoints, result and report."""
    max_length: int = 256
    """Tokens in a row, of a T5 on either side; at most what the model was made for."""
    batch_size: int = 8
    """Rows in a batch; all there are, where that is less."""
    learning_rate: float = 1e-2
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay on the trained leaves."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; inf clips nothing."""
    seed: int = 0
    """Fixes the adapter's initial values, the order of the data and all else that is random."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers of the base model and of the computation; trained leaves and the optimiser's state
    are float32 always."""
    remat: Remat = "none"
    """Recompute parts of each layer in the backward pass, to save memory: all but the results of
    matrix products (dots), those of attention too (dots_no_batch), or everything (full)."""
    accumulate: int = 1
    """Split every batch into this many parts, one after the other, to save memory."""
    mesh: str = ""
    """Devices to share the work, by axis: data=2,fsdp=4,tensor=1. One size may be -1: all
    remaining devices. By default one device, or with several processes data=-1."""
    coordinator: str | None = None
    """For several processes, each started with the same command: auto on TPU pods, under Slurm and
    on Kubernetes; else host:port of process 0."""
    processes: int | None = None
    """How many processes there are; with host:port."""
    process: int | None = None
    """Which of them this is, from 0; with host:port."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    eval_every: int | None = None
    """Steps between two evaluations; by default only before and after, and after each epoch where
    labels are learned."""
    save_every: int = 50
    """Steps between two checkpoints."""
    tensorboard: bool = False
    """Write TensorBoard logs into the run folder too (needs tensorboardX)."""

    def __post_init__(self) -> None:
        wrong = wrong_numbers(self, self.allowed)
        if self.batch_size % max(self.accumulate, 1):
            wrong.append(
                f"--accumulate {self.accumulate} does not divide --batch-size {self.batch_size}"
            )
        numbers = {"processes": self.processes, "process": self.process}
        given = [f"{flag(name)} {n}" for name, n in numbers.items() if n is not None]
        if given and self.coordinator in (None, "auto"):
            said = "with --coordinator auto" if self.coordinator else "without --coordinator"
            wrong.append(f"{' '.join(given)} {said} says nothing: give --coordinator host:port of "
                         "process 0, or leave it out")  # fmt: skip
        if wrong:
            raise UserError("; ".join(wrong))
        super().__post_init__()
