"""The options of training runs: one run, and several of them side by side."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_mini_jax.errors import UserError
from lora_mini_jax.options.adapter import METHOD_SETTINGS, AdapterOptions

if TYPE_CHECKING:
    from lora_mini_jax.data import Fields


@dataclass(frozen=True)
class Finetune(AdapterOptions):
    """Fine-tune a model with an adapter; run the same command again to go on after an interruption.

    Data may be text (``text``), prompt and completion fields, or chat ``messages``.
    """

    data: str = ""
    """Training data: a jsonl, json, csv, tsv, parquet or txt file, a folder, or a hub id."""
    valid: str = ""
    """Held-out data in the same form; without it the last 5% of the training data is held out."""
    output_dir: str = "runs/finetune"
    """The run folder: config, metrics, checkpoints, adapter and report."""

    text_field: str | None = None
    """Field that holds the text; by default "text", or "messages" where records have that."""
    prompt_field: str | None = None
    """Field that holds the prompt, on which no loss is taken."""
    completion_field: str | None = None
    """Field that holds the completion."""
    messages_field: str | None = None
    """Field that holds chat messages; loss is taken on the assistant's turns."""
    separator: str = "\n"
    """Put between prompt and completion."""
    max_length: int = 256
    """Tokens in a row; at most what the model was made for."""
    packing: bool = True
    """Put several examples in a row, which never attend to each other."""
    overlong: Literal["skip", "truncate", "error"] = "skip"
    """What to do with an example longer than max_length; the report says how many there were."""
    max_train_examples: int | None = None
    """Read no more than this many training records."""
    max_valid_examples: int | None = None
    """Read no more than this many held-out records."""

    epochs: float = 2.0
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after this many updates, whatever epochs says."""
    batch_size: int = 8
    """Rows in a batch."""
    learning_rate: float = 1e-2
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay on the trained leaves."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    seed: int = 0
    """Fixes the adapter's draw, the order of the data and everything else random."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; trained leaves and optimiser state are float32 always."""
    remat: bool = False
    """Recompute each layer in the backward pass, to save memory."""

    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    eval_every: int | None = None
    """Steps between two evaluations; by default only before and after."""
    save_every: int = 50
    """Steps between two checkpoints."""
    tensorboard: bool = False
    """Write TensorBoard logs into the run folder too (needs tensorboardX)."""
    samples: int = 2
    """How many held-out prompts to continue, before and after."""
    max_new_tokens: int = 48
    """Tokens in each of these samples."""

    def __post_init__(self) -> None:
        wrong = [f"--{name.replace('_', '-')} is {getattr(self, name)}: {allowed}"
                 for name, allowed in _wrong_numbers(self)]  # fmt: skip
        if wrong:
            raise UserError("; ".join(wrong))
        super().__post_init__()
        self.record_fields()

    def record_fields(self) -> "Fields":
        """Which fields of a record hold what."""
        from lora_mini_jax.data import Fields

        return Fields(
            self.text_field,
            self.prompt_field,
            self.completion_field,
            self.messages_field,
            self.separator,
        )


@dataclass(frozen=True)
class Compare(Finetune):
    """Run several methods and seeds on one task; table, JSON and plots."""

    output_dir: str = "runs/compare"
    """The folder of the comparison; every run has its own inside."""
    methods: tuple[str, ...] = ("lora-mini", "lora")
    """Methods, each with its own settings: lora-mini:rank=4,a=32,b=32,learning_rate=0.02 ..."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every method is run with every seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods or not self.seeds:
            raise UserError("--methods and --seeds need at least one each")
        for spec in self.methods:
            self.run_options(spec, self.seeds[0])

    def run_options(self, spec: str, seed: int) -> Finetune:
        """The options of one run: ``spec`` is a method's name and perhaps ``:key=value,...``."""
        from lora_mini_jax.methods import method_class

        name, _, settings = spec.partition(":")
        own = method_class(name).field_names()
        shared: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Finetune)}
        folder = f"{_safe(spec)}-seed{seed}"
        changed = {"method": name, "seed": seed, "output_dir": str(Path(self.output_dir) / folder)}
        # What is given for all goes to the methods that have it; what a spec says must fit.
        shared |= {field: None for field in METHOD_SETTINGS if field not in own}
        shared |= changed | _settings(settings, spec)
        return Finetune(**shared)


def _wrong_numbers(options: Finetune) -> list[tuple[str, str]]:
    """The options out of range, and what is allowed."""
    whole = ("max_length", "batch_size", "log_every", "save_every", "max_new_tokens")
    optional = ("max_train_examples", "max_valid_examples", "max_steps", "eval_every")
    at_least_1 = [
        n for n in (*whole, *optional) if (v := getattr(options, n)) is not None and v < 1
    ]
    positive = [
        n for n in ("epochs", "learning_rate", "max_grad_norm") if not getattr(options, n) > 0
    ]
    not_negative = [n for n in ("weight_decay", "seed", "samples") if not getattr(options, n) >= 0]
    share = [] if 0 <= options.warmup_ratio <= 1 else ["warmup_ratio"]
    return [
        *((name, "give a whole number from 1") for name in at_least_1),
        *((name, "give a number above 0") for name in positive),
        *((name, "give a number from 0") for name in not_negative),
        *((name, "give a number from 0 to 1") for name in share),
    ]


def _safe(spec: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in spec)


def _settings(text: str, spec: str) -> dict[str, Any]:
    """``"rank=4,learning_rate=0.02"`` as a dict with the options' own types."""
    kinds = {f.name: f.type for f in fields(Finetune)}
    values: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if not equals or name not in kinds:
            raise UserError(
                f"{spec!r}: {pair!r} is not a setting; write like lora-mini:rank=4,a=32"
            )
        kind = next((k for k in (int, float) if k.__name__ in str(kinds[name])), str)
        try:
            values[name] = kind(value)
        except ValueError:
            raise UserError(f"{spec!r}: {name} must be a {kind.__name__}, not {value!r}") from None
    return values
