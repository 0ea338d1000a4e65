"""The commands that use a trained adapter: continue or answer prompts, merge, export."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lora_mini_jax import peft
from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.adapters.transform import merge
from lora_mini_jax.commands.prompts import read_prompts
from lora_mini_jax.data import load_tokenizer
from lora_mini_jax.errors import UserError
from lora_mini_jax.files import check_replaceable
from lora_mini_jax.generation.generate import generate
from lora_mini_jax.models import load
from lora_mini_jax.models import save as save_model
from lora_mini_jax.models.families import family_of_module
from lora_mini_jax.models.hub import load_module, resolve
from lora_mini_jax.options import BASE, Export, Generate, Merge
from lora_mini_jax.peft import config, tensors
from lora_mini_jax.runs.run import Log
from lora_mini_jax.tasks.devices import Devices
from lora_mini_jax.tasks.trained import Trained

AT_ONCE = 32
"""Prompts that are continued together; a file may have any number."""


def run_generate(options: Generate, say: Log = print) -> list[str]:
    """Continue each prompt and say it, or say what a T5 answers; returns what the model wrote.

    Raises:
        UserError: a model or adapter that cannot be used, or settings out of range.
    """
    devices = Devices.on(options.mesh)
    trained = Trained.read(options.adapter, options.model) if options.adapter else None
    folder = trained.base_folder if trained else resolve(options.model or BASE)
    module = load_module(folder)
    answers = family_of_module(module).kind == "seq2seq"
    if answers and options.chat:
        raise UserError(
            "--chat is for decoders with a chat template, and a T5 has none: leave it out"
        )
    tokenizer = load_tokenizer(folder)
    prompts = read_prompts(options, tokenizer, answers)
    adapter: Adapter | None = None
    if trained:
        allowed = options.allow_different_base
        model, params, adapter = trained.load(allowed, options.dtype, devices)
    else:
        model, params = load(folder, **devices.reading(module, options.dtype or "float32"))
    texts = []
    for start in range(0, len(prompts), AT_ONCE):
        part = prompts[start : start + AT_ONCE]
        written = generate(
            model,
            params,
            [prompt.ids for prompt in part],
            adapter=adapter,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=(options.seed + start) % 2**32,  # or equal prompts would be answered equally
        )
        for prompt, ids in zip(part, written, strict=True):
            text = tokenizer.decode(ids) if answers else tokenizer.continuation(prompt.ids, ids)
            texts.append(before_stop(text, options.stop))
            say(prompt.before + texts[-1])
    return texts


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stops.

    Example:
        >>> before_stop("Paris. Q: And of Spain?", ["\\n", " Q:"])
        'Paris.'
    """
    return text[: min((text.find(each) for each in stop if each in text), default=len(text))]


def run_merge(options: Merge, say: Log = print) -> None:
    """Write the merged model in Hugging Face layout.

    Raises:
        UserError: a model or adapter that cannot be used, or an output folder that is not empty.
    """
    devices = Devices.on(options.mesh)
    trained = Trained.read(options.adapter, options.model)
    model, params, adapter = trained.load(options.allow_different_base, devices=devices)
    dtype = jnp.dtype(options.dtype)
    merged = merge(params, adapter, dtype)
    save_model(options.output_dir, model, merged, dtype=dtype, tokenizer_from=trained.base_folder)
    say(f"merged model: {options.output_dir}")


def run_export(options: Export, say: Log = print) -> None:
    """Write the adapter as PEFT's.

    Raises:
        UserError: a model or adapter that cannot be used, a method that PEFT has no form of, or an
            output folder that holds anything but an adapter of PEFT's.
    """
    check_replaceable(options.output_dir, {config.FILE, tensors.FILE})
    devices = Devices.on(options.mesh)
    trained = Trained.read(options.adapter, options.model)
    model, params, adapter = trained.load(options.allow_different_base, devices=devices)
    peft.save(
        options.output_dir,
        adapter,
        params,
        names=peft.names_of(model),
        base=trained.base,
        as_lora=options.as_lora,
        task_type=_task_type(model, trained),
    )
    say(f"PEFT adapter: {options.output_dir}")


def _task_type(model: Any, trained: Trained) -> str:
    """What PEFT calls the task of a model with this adapter."""
    if trained.head is not None:
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if family_of_module(model).kind == "seq2seq" else "CAUSAL_LM"
