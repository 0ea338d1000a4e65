"""The options of a fine-tuning run."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from lora_mini_jax.errors import UserError, flag
from lora_mini_jax.options.adapter import AdapterOptions
from lora_mini_jax.options.labels import LabelOptions
from lora_mini_jax.options.numbers import COUNT, NOT_NEGATIVE, POSITIVE
from lora_mini_jax.options.training import Training
from lora_mini_jax.settings.choices import Bits, Overlong

if TYPE_CHECKING:
    from lora_mini_jax.data import Fields


OF_AN_ADAPTER = ("method", "target_modules", "exclude_modules", "modules_to_save", "overrides",
                 "budget")  # fmt: skip
"""Options that an adapter to begin from leaves nothing to say of, as it does of the settings."""


@dataclass(frozen=True)
class Finetune(Training, AdapterOptions, LabelOptions):
    """Fine-tune a model with an adapter. After an interruption, run the same command to resume.

    Records may hold text, a prompt and a completion, or chat messages. A T5 needs a prompt and a
    completion; an encoder (--task classification or regression) one or two texts and a label.
    """

    allowed: ClassVar[dict[str, str]] = {
        **Training.allowed,
        **dict.fromkeys(("max_train_examples", "max_valid_examples", "max_steps"), COUNT),
        "max_new_tokens": COUNT,
        "epochs": POSITIVE,
        "lora_plus_ratio": POSITIVE,
        "samples": NOT_NEGATIVE,
    }

    data: str = ""
    """Training data: a jsonl, json, csv, tsv, parquet or txt file, a folder, or a hub id."""
    valid: str = ""
    """Held-out data in the same form. Without it the validation split of --data is held out, where
    that is a folder or a hub data set that has one; else the last 5% of the training data."""
    output_dir: str = "runs/finetune"
    """The run folder: config, metrics, checkpoints, adapter and report."""

    init_adapter: str = ""
    """Begin from this adapter, which finetune, lora_mini_jax.save or PEFT wrote: a folder. Method,
    settings and kernels are the adapter's own."""

    text_field: str | None = None
    """Field that holds the text; by default "text", or "messages", "conversations", or "prompt" and
    "completion" where records have those."""
    prompt_field: str | None = None
    """Field that holds the prompt, on which no loss is taken; of a T5 the source."""
    completion_field: str | None = None
    """Field that holds the completion; of a T5 the target."""
    messages_field: str | None = None
    """Field that holds chat messages, with or without "tools" beside it; loss is taken on the
    assistant's turns."""
    separator: str = "\n"
    """Put between prompt and completion, where they are one text."""
    packing: bool = True
    """Put several examples in a row, which never attend to each other; a T5's have one each."""
    overlong: Overlong = "skip"
    """What to do with an example longer than max_length; the report says how many there were."""
    max_train_examples: int | None = None
    """Read no more than this many training records."""
    max_valid_examples: int | None = None
    """Read no more than this many held-out records."""

    cache_dir: str = "auto"
    """Where tokenised data is kept, so that no run tokenises what another has: a folder; auto is
    $LORA_MINI_CACHE, or lora_mini_jax in $XDG_CACHE_HOME or ~/.cache; none keeps it in memory.
    Labelled data is in memory always."""

    scan_layers: bool = False
    """Compile one layer and run it as often as there are layers: deep models compile much sooner,
    and each step may take a little longer."""
    quantize: Bits | None = None
    """Keep the base's linear kernels in 8 or 4 bits (needs qwix). Use it with --remat full, or the
    backward pass keeps dense kernels, and little memory is saved."""
    epochs: float = 2.0
    """Passes over the training data; --max-steps overrides it."""
    max_steps: int | None = None
    """Updates in all, less than an epoch or many; overrides --epochs."""
    lora_plus_ratio: float = 1.0
    """LoRA+: the learning rate of every factor B is this many times that of the others."""

    samples: int = 2
    """How many held-out prompts to continue, before and after."""
    max_new_tokens: int = 48
    """Tokens in each of these samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settle(self.eval_every)
        self.record_fields()
        if self.init_adapter:
            self._check_nothing_else()
        elif self.lora_plus_ratio != 1 and "B" not in (names := self.adapter_method().trained()):
            raise UserError(f"--lora-plus-ratio is for methods that train a B; {self.method} "
                            f"trains {', '.join(sorted(names))}: leave it out")  # fmt: skip

    def _check_nothing_else(self) -> None:
        """What an adapter brings is not given beside it."""
        defaults = {field.name: field.default for field in fields(self)}
        given = [name for name in OF_AN_ADAPTER if getattr(self, name) != defaults[name]]
        given += self.parsed_settings()
        if given:
            raise UserError(f"--init-adapter {self.init_adapter} brings its own method, settings "
                            f"and kernels: leave out {', '.join(map(flag, given))}")  # fmt: skip

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
