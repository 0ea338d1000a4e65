"""What a pre-training run works on: a model from scratch, the method's sites, and text."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.adapters.sites import Site, plan_sites
from lora_mini_jax.algebra.draws import as_key
from lora_mini_jax.data import (
    Batches,
    Tokenizer,
    encode_texts,
    find_texts,
    hold_out,
    load_tokenizer,
    pack,
    thinned,
)
from lora_mini_jax.errors import UserError, flag
from lora_mini_jax.methods import Full
from lora_mini_jax.models import Llama, LlamaConfig
from lora_mini_jax.models.hub import load_decoder_config
from lora_mini_jax.options import Pretrain
from lora_mini_jax.runs.schedule import length_notes, of_length
from lora_mini_jax.selection import select
from lora_mini_jax.tasks.data import batch_notes, in_batches
from lora_mini_jax.tasks.devices import Devices
from lora_mini_jax.tasks.language import LanguageTask, check_length
from lora_mini_jax.tasks.sites import all_targets
from lora_mini_jax.tree import flatten, unflatten


def prepare(options: Pretrain) -> LanguageTask:
    """The model as drawn from the seed, its sites and its text, everything checked.

    Raises:
        UserError: as `pretrain.pretrain`; wrong settings of the method before any text is read.
    """
    if not options.data:
        raise UserError("no training data: give --data, text files or folders")
    tokenizer = load_tokenizer(options.tokenizer)
    config = shape(options, tokenizer)
    model = Llama(config, jnp.dtype(options.dtype), scan_layers=True, remat=options.remat)
    sites = planned_sites(options, model)
    train, valid = read_texts(options, tokenizer)
    tokens = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, as_key(options.seed), tokens)["params"]
    places = Devices.of(options).params(shapes, all_targets(model)[0])
    init = jax.jit(lambda key: model.init(key, tokens)["params"], out_shardings=places)
    params = init(as_key(options.seed))
    return LanguageTask(
        model,
        params,
        sites,
        train,
        valid,
        notes=[*batch_notes(options, train), *length_notes(sites, options.steps)],
        tokenizer=tokenizer,
        prompts=[],
    )


def shape(options: Pretrain, tokenizer: Tokenizer) -> LlamaConfig:
    """The shape of the model, with the sizes that the options give.

    Raises:
        UserError: sizes that do not go together, or too small for the tokenizer or the rows.
    """
    config, sizes = load_decoder_config(options.shape), options.sizes()
    if {"hidden_size", "num_attention_heads"} & set(sizes):
        sizes["head_dim"] = 0  # what hidden_size over heads gives
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    try:
        config = replace(config, **sizes, **ids)
    except UserError as error:  # which takes them for a file's
        said = str(error).removesuffix("; correct config.json")
        flags = " ".join(f"{flag(n)} {v}" for n, v in options.sizes().items())
        raise UserError(f"{flags}, the rest as in {options.shape}: {said}; give others") from None
    check_length(options.max_length, config)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the vocabulary {config.vocab_size}"
            f": give --vocab-size {tokenizer.vocab_size}, or another --tokenizer"
        )
    return config


def planned_sites(options: Pretrain, model: Llama) -> tuple[Site, ...]:
    """The method on every linear kernel but the head's, and `Full` on every other parameter."""
    kernels, everything = all_targets(model)
    linear = select(kernels, "all-linear")
    rest = [target for target in everything if target not in linear]
    sites = plan_sites(options.adapter_method(), linear, modules_to_save=rest)
    return of_length(sites, options.steps, options.parsed_settings())


def read_texts(options: Pretrain, tokenizer: Tokenizer) -> tuple[Batches, Batches]:
    """Rows to train on and held-out rows, of different files."""
    texts = find_texts(options.data, options.suffixes)
    if options.valid:
        held_out = find_texts(options.valid, options.suffixes)
        apart = {text.path for text in held_out}
        texts = [text for text in texts if text.path not in apart]
    else:
        texts, held_out = hold_out(texts, options.held_out)
    if not texts:
        raise UserError("every file of --data is held out by --valid: give more files")
    pieces = [encode_texts(part, tokenizer, options.max_length) for part in (texts, held_out)]
    pieces[1] = thinned(pieces[1], options.max_valid_tokens)
    train, valid = in_batches(options, *(pack(part, options.max_length) for part in pieces))
    return train, valid


def begin(params: Any, adapter: Adapter) -> tuple[Any, Adapter]:
    """``params`` and adapter at step 0, with the same function as before.

    Weights that are trained whole move into the adapter and leave zeros behind: there, weight decay
    draws the weights to zero, and not their distance from where they began.
    """
    flat, trainable = flatten(params), dict(adapter.trainable)
    for target in (site.target for site in adapter.sites if isinstance(site.method, Full)):
        path = target.path
        trainable[path] = {"dense": target.matrix(flat[path])}
        flat[path] = jnp.zeros_like(flat[path])
    return unflatten(flat), adapter.with_trainable(trainable)
