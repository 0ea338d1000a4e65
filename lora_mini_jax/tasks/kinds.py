"""Which kind of task a run's options name."""

from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.models.families import family_of_module
from lora_mini_jax.models.hub import load_module
from lora_mini_jax.options import Finetune
from lora_mini_jax.tasks.initial import Initial
from lora_mini_jax.tasks.label import LabelTask
from lora_mini_jax.tasks.language import LanguageTask
from lora_mini_jax.tasks.seq2seq import Seq2SeqTask
from lora_mini_jax.tasks.task import Task


def kind_of(options: Finetune) -> type[Task]:
    """The class of the task; what a model reads and writes shows in its ``config.json``."""
    if options.task != "language":
        return LabelTask
    kind = family_of_module(load_module(options.model)).kind
    return Seq2SeqTask if kind == "seq2seq" else LanguageTask


def prepare(options: Finetune) -> Task:
    """Read everything a run needs; whatever is wrong with it shows here, before any training. The
    sites of an adapter to begin from are not among it: they come with its leaves (`initial`).

    Raises:
        UserError: a model, tokenizer or data file that cannot be used, or kernels that the method
            cannot adapt.
    """
    return kind_of(options).read(options)


def planned(options: Finetune) -> tuple[Site, ...]:
    """What would be trained, from the model's ``config.json`` alone; errors as for `prepare`, and
    for an adapter of PEFT's to begin from."""
    initial = Initial.of(options)
    return initial.sites if initial else kind_of(options).planned(options)
