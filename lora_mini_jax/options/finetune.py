"""The options of training runs: one run, and several of them side by side."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_mini_jax.errors import UserError
from lora_mini_jax.options.adapter import AdapterOptions
from lora_mini_jax.options.labels import LabelOptions
from lora_mini_jax.options.training import COUNT, NOT_NEGATIVE, POSITIVE, Training
from lora_mini_jax.spec import split_spec, to_pairs

if TYPE_CHECKING:
    from lora_mini_jax.data import Fields


@dataclass(frozen=True)
class Finetune(Training, AdapterOptions, LabelOptions):
    """Fine-tune a model with an adapter; run the same command again to go on after an interruption.

    Data may be text (``text``), prompt and completion fields, or chat ``messages``; for a T5 prompt
    and completion; for an encoder (--task classification or regression) one or two text fields and
    a label.
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
    """Held-out data in the same form; without it the last 5% of the training data is held out."""
    output_dir: str = "runs/finetune"
    """The run folder: config, metrics, checkpoints, adapter and report."""

    text_field: str | None = None
    """Field that holds the text; by default "text", or "messages", or "prompt" and "completion"
    where records have those."""
    prompt_field: str | None = None
    """Field that holds the prompt, on which no loss is taken; of a T5 the source."""
    completion_field: str | None = None
    """Field that holds the completion; of a T5 the target."""
    messages_field: str | None = None
    """Field that holds chat messages; loss is taken on the assistant's turns."""
    separator: str = "\n"
    """Put between prompt and completion, where they are one text."""
    packing: bool = True
    """Put several examples in a row, which never attend to each other; a T5's have one each."""
    overlong: Literal["skip", "truncate", "error"] = "skip"
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
    quantize: Literal["int8", "nf4"] | None = None
    """Keep the base's linear kernels in 8 or 4 bits (needs qwix); saves memory with remat."""
    epochs: float = 2.0
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after this many updates, whatever epochs says."""
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
        if self.lora_plus_ratio != 1 and "B" not in (names := self.adapter_method().trained()):
            raise UserError(f"--lora-plus-ratio is for methods that train a B; {self.method} "
                            f"trains {', '.join(sorted(names))}: leave it out")  # fmt: skip

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

        name, given = split_spec(spec)
        own, names = method_class(name).field_names(), {f.name: f.type for f in fields(Finetune)}
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Finetune)}
        changed = {n: _typed(spec, n, v, names[n]) for n, v in given.items() if n in names}
        # What is given for all goes to the methods that have it; what a spec says must fit.
        settings = {n: v for n, v in self.parsed_settings().items() if n in own}
        settings |= {n: v for n, v in given.items() if n not in names}
        folder = str(Path(self.output_dir) / f"{_safe(spec)}-seed{seed}")
        values |= {"method": name, "seed": seed, "output_dir": folder}
        values |= {"settings": to_pairs(settings)} | changed
        return Finetune(**values)


def _safe(spec: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in spec)


def _typed(spec: str, name: str, value: Any, kind: Any) -> Any:
    """A setting of the run, as the option it stands for wants it."""
    if "None" in str(kind) and value == "none":
        return None
    if "tuple" in str(kind):
        return tuple(str(value).split("+"))
    wanted = next((k for k in (bool, int, float) if k.__name__ in str(kind)), str)
    fits = isinstance(value, int | float) if wanted is float else type(value) is wanted
    if wanted is str:
        return str(value)
    if not fits:
        raise UserError(f"{spec!r}: {name} must be a {wanted.__name__}, not {value!r}")
    return wanted(value)
