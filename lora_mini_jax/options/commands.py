"""The options of the commands that do not train."""

from dataclasses import dataclass
from typing import Literal

from lora_mini_jax.errors import UserError
from lora_mini_jax.options.adapter import AdapterOptions
from lora_mini_jax.options.numbers import COUNT, SEED, check_numbers


@dataclass(frozen=True)
class Demo:
    """Compare LoRA-Mini and LoRA on the small model in the package and Python's help topics."""

    output_dir: str = "runs/demo"
    """Where the runs, the table and the report go."""
    steps: int = 80
    """Updates of each of the two runs."""

    def __post_init__(self) -> None:
        check_numbers(self, {"steps": COUNT})


@dataclass(frozen=True)
class Methods:
    """List the methods with their settings and defaults."""


@dataclass(frozen=True)
class Inspect(AdapterOptions):
    """Show which kernels an adapter would train, and what it would cost. Trains nothing.

    Reads config.json only. An encoder is shown without the head that a task trains whole beside
    the adapter.
    """

    batch_size: int = 8
    """Rows in the batch of which the step's FLOPs are counted."""
    max_length: int | None = None
    """Tokens in a row of that batch, of a T5 on either side; by default 256, or what the model was
    made for where that is less."""
    config_only: bool = False
    """Leave the step's FLOPs out, which take tracing the whole model's gradients."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, {"batch_size": COUNT, "max_length": COUNT})
        batch = self.batch_size != Inspect.batch_size or self.max_length is not None
        if self.config_only and batch:
            raise UserError("--batch-size and --max-length are of the step whose FLOPs "
                            "--config-only skips: leave out the one or the others")  # fmt: skip


@dataclass(frozen=True)
class Generate:
    """Continue prompts with a decoder, or answer them with a T5, with or without an adapter."""

    prompt: tuple[str, ...] = ()
    """One or more prompts; a T5 reads them as sources, and its answers alone are printed."""
    prompts: str | None = None
    """Instead, data with a prompt in every record, in a field prompt or text: a file, a folder or a
    hub id, as for finetune. With --chat the field may be messages, with tools beside it."""
    model: str | None = None
    """A decoder or a T5: folder or hub id; by default the one that the adapter was trained on.
    Without an adapter, the small demo model in the package is used."""
    adapter: str | None = None
    """An adapter folder, such as runs/finetune/adapter."""
    chat: bool = False
    """Each prompt is a user's message, put through the model's chat template; the answers alone are
    printed."""
    system: str | None = None
    """With --chat: the system's message, before every prompt."""
    stop: tuple[str, ...] = ()
    """Texts at which a printed text ends, before the first of them."""
    max_new_tokens: int = 64
    """At most so many tokens are written for each prompt."""
    temperature: float = 0.0
    """0 takes the likeliest token every time; above, logits are divided by it and sampled."""
    top_p: float = 1.0
    """Sample from the smallest set of likeliest tokens of this probability."""
    seed: int = 0
    """Seed of the sampling; the same seed gives the same text."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Numbers of the base model and of the computation; by default those that the adapter was
    trained in, and without an adapter float32."""
    mesh: str = ""
    """Devices to share the model, by axis: fsdp=4,tensor=2, as for finetune; along data all would
    do the same work. By default one device."""
    allow_different_base: bool = False
    """Go on although the adapter was trained on other weights."""

    def __post_init__(self) -> None:
        if not self.prompt and self.prompts is None:
            raise UserError("--prompt has no text: give one or more, or data with --prompts")
        if self.prompt and self.prompts is not None:
            raise UserError("--prompt and --prompts are both given: leave one out")
        if self.system is not None and not self.chat:
            raise UserError("--system is for chats: add --chat, or leave it out")
        if "" in self.stop:
            raise UserError("--stop has an empty text, which is everywhere: leave it out")
        check_numbers(self, {"seed": SEED})
        for text in (*self.prompt, self.system or ""):
            try:
                text.encode()
            except UnicodeEncodeError:  # Python keeps the bytes of such words as half characters
                name = "--system" if text == self.system else "--prompt"
                raise UserError(f"{name} {text!r} is not UTF-8 text: give it as UTF-8") from None


@dataclass(frozen=True)
class Predict:
    """Predict classes or numbers with a trained classifier adapter."""

    adapter: str
    """An adapter folder, such as runs/finetune/adapter."""
    data: str
    """The texts: a file, folder or hub id, as for finetune; labels are not looked at."""
    output: str
    """The jsonl file to write: of each record its index from 0, its label and the probabilities of
    all labels, or its value. Earlier predictions are replaced, any other file is left alone."""
    model: str | None = None
    """The base model: folder or hub id; by default the one the adapter was trained on."""
    split: str = "test"
    """The split of data that has several."""
    batch_size: int = 32
    """Rows in a batch."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Numbers of the base model and of the computation; by default those that the adapter was
    trained in."""
    mesh: str = ""
    """Devices to share the work, by axis: data=2,fsdp=4,tensor=1, as for finetune; --batch-size is
    that of all together. By default one device."""
    allow_different_base: bool = False
    """Go on although the adapter was trained on other weights."""

    def __post_init__(self) -> None:
        check_numbers(self, {"batch_size": COUNT})


@dataclass(frozen=True)
class Merge:
    """Merge an adapter into its base model and write a Hugging Face folder."""

    adapter: str
    """An adapter folder."""
    output_dir: str
    """The folder to write; must be new or empty."""
    model: str | None = None
    """The base model: folder or hub id; by default the one the adapter was trained on."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Numbers of the written weights; a narrow one can lose a small update."""
    mesh: str = ""
    """Devices to share the model, by axis: fsdp=4,tensor=2, as for finetune. By default one."""
    allow_different_base: bool = False
    """Go on although the adapter was trained on other weights."""


@dataclass(frozen=True)
class Export:
    """Export an adapter to Hugging Face's PEFT (adapter_config.json, adapter_model.safetensors)."""

    adapter: str
    """An adapter folder."""
    output_dir: str
    """The folder to write; must be new or empty, or an adapter of PEFT's, which is replaced."""
    model: str | None = None
    """The base model: folder or hub id; by default the one the adapter was trained on."""
    as_lora: bool = False
    """Write a plain LoRA of one rank, its scale in the factors, whatever the method: for servers
    such as vLLM."""
    mesh: str = ""
    """Devices to share the model, by axis: fsdp=4,tensor=2, as for finetune. By default one."""
    allow_different_base: bool = False
    """Go on although the adapter was trained on other weights."""
