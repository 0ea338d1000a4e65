"""The commands that use a trained adapter: continue prompts, merge into the base, export."""

import jax.numpy as jnp

from lora_mini_jax import peft, storage
from lora_mini_jax.adapter import Adapter
from lora_mini_jax.data import load_tokenizer
from lora_mini_jax.decode import generate
from lora_mini_jax.finetune import Log
from lora_mini_jax.head import head_of, load_for
from lora_mini_jax.models import load
from lora_mini_jax.models import save as save_model
from lora_mini_jax.models.hub import resolve
from lora_mini_jax.options import Export, Generate, Merge
from lora_mini_jax.transform import merge


def run_generate(options: Generate, say: Log = print) -> list[str]:
    """Continue each prompt and say it; returns the continuations.

    Raises:
        UserError: a model or adapter that cannot be used, or sampling settings out of range.
    """
    folder = resolve(options.model)
    model, params = load(folder)
    tokenizer = load_tokenizer(folder)
    adapter: Adapter | None = None
    if options.adapter is not None:
        allow = options.allow_different_base
        adapter = storage.load(options.adapter, params, allow_different_base=allow)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    written = generate(
        model,
        params,
        [start + tokenizer.encode(prompt) for prompt in options.prompt],
        adapter=adapter,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    texts = [tokenizer.decode(ids) for ids in written]
    for prompt, text in zip(options.prompt, texts, strict=True):
        say(prompt + text)
    return texts


def run_merge(options: Merge, say: Log = print) -> None:
    """Write the merged model in Hugging Face layout.

    Raises:
        UserError: a model or adapter that cannot be used, or an output folder that is not empty.
    """
    folder = resolve(options.model)
    model, params = load_for(options.adapter, folder)
    allow = options.allow_different_base
    adapter = storage.load(options.adapter, params, allow_different_base=allow)
    merged = merge(params, adapter)
    dtype = jnp.dtype(options.dtype)
    save_model(options.output_dir, model, merged, dtype=dtype, tokenizer_from=folder)
    say(f"merged model: {options.output_dir}")


def run_export(options: Export, say: Log = print) -> None:
    """Write the adapter as PEFT's.

    Raises:
        UserError: a model or adapter that cannot be used, or a method that PEFT has no form of.
    """
    model, params = load_for(options.adapter, resolve(options.model))
    allow = options.allow_different_base
    adapter = storage.load(options.adapter, params, allow_different_base=allow)
    peft.save(
        options.output_dir,
        adapter,
        params,
        names=peft.names_of(model),
        base=options.model,
        as_lora=options.as_lora,
        task_type="CAUSAL_LM" if head_of(options.adapter) is None else "SEQ_CLS",
    )
    say(f"PEFT adapter: {options.output_dir}")
