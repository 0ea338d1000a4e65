"""The task that `kinds.prepare` would read, of shapes alone: no weights, no tokenizer, no data.

Its loss is the very one that is trained, and its rows are made by what makes those of the data.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_mini_jax import linen
from lora_mini_jax.data import Batches, Example, Labelled, pack
from lora_mini_jax.data.pair_rows import pair_rows
from lora_mini_jax.data.pairs import Pair
from lora_mini_jax.models.families import family_of_module
from lora_mini_jax.models.hub import load_module, resolve
from lora_mini_jax.options import Finetune
from lora_mini_jax.quantized import quantize
from lora_mini_jax.selection import select
from lora_mini_jax.tasks.kinds import kind_of, planned
from lora_mini_jax.tasks.label import LabelTask, check_rows, named_head
from lora_mini_jax.tasks.language import LanguageTask
from lora_mini_jax.tasks.seq2seq import Seq2SeqTask
from lora_mini_jax.tasks.task import Task

NONE: Any = None
"""For the tokenizer, which no loss asks for."""


def abstract_task(options: Finetune) -> Task:
    """The task of these options with shapes for parameters, from ``config.json`` alone.

    Its data is one row as long as ``max_length`` lets rows be; those of real data that is shorter
    are shorter too where texts are labelled or answered. Where neither ``labels`` nor ``glue``
    names the classes there are as many as ``config.json`` says.

    Raises:
        UserError: a model that cannot be read, is not for the task or for rows so long; kernels
            that the method cannot adapt.
    """
    folder = resolve(options.model)
    kind = kind_of(options)
    if not issubclass(kind, LanguageTask):
        return _labelled(options, folder)
    kind.config(options, folder)  # checks it
    rows = _pair if issubclass(kind, Seq2SeqTask) else _text
    parts = _parts(options, load_module(folder), rows(options.max_length))
    return kind(*parts, tokenizer=NONE, prompts=[])


def _labelled(options: Finetune, folder: Path) -> Task:
    head = named_head(options)
    module, kind = head.module(folder), np.float32 if options.task == "regression" else np.int32
    ids = (np.zeros((1, head.max_length), np.int32) for _ in range(3))
    rows = Labelled(*ids, np.zeros(1, kind), np.zeros(1, bool))
    check_rows(module, NONE, rows)
    return LabelTask(*_parts(options, module, rows), head)


def _parts(options: Finetune, module: Any, rows: Any) -> tuple[Any, ...]:
    """What every task has: model, parameters, sites, data twice, and no notes."""
    dtype = jnp.dtype(options.dtype)
    how = {"dtype": dtype, "param_dtype": dtype, "scan_layers": options.scan_layers}
    model = module.clone(**how, remat=options.remat)
    data = Batches(rows, options.batch_size, options.seed)
    return model, _params(options, model), planned(options), data, data, []


def _params(options: Finetune, model: Any) -> Any:
    """Shapes and dtypes, as `devices.reading` has the parameters read."""
    family, bits = family_of_module(model), options.quantize
    shapes = family.shapes(model)
    if bits is None:
        return shapes
    kernels = select(linen.targets(model, shapes, *family.inputs()), "all-linear")
    return jax.eval_shape(lambda params: quantize(params, kernels, bits), shapes)


def _text(length: int) -> Any:
    return pack([Example(np.zeros(length, np.int32), np.ones(length, bool))], length)


def _pair(length: int) -> Any:
    return pair_rows([Pair(*np.zeros((2, length), np.int32))], max_length=length)
