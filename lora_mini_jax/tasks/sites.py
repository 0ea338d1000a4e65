"""Which method adapts which kernel of a model, as a run's options say; no weights are needed."""

from collections.abc import Sequence

import flax.linen as nn

from lora_mini_jax import linen
from lora_mini_jax.adapters.budget import within
from lora_mini_jax.adapters.sites import Site, check_sites, plan_sites
from lora_mini_jax.layers import first
from lora_mini_jax.models.families import family_of_module
from lora_mini_jax.options import AdapterOptions, Finetune, one_or_names
from lora_mini_jax.selection import select
from lora_mini_jax.tree import Target, parameters


def all_targets(model: nn.Module) -> tuple[tuple[Target, ...], tuple[Target, ...]]:
    """The kernels of a model that `load` reads, and all its parameters."""
    family = family_of_module(model)
    shapes = family.shapes(model)
    kernels = linen.targets(model, shapes, *family.inputs())
    return kernels, parameters(shapes, kernels)


def planned_sites(
    options: Finetune, model: nn.Module, trunk: Sequence[str] = ()
) -> tuple[Site, ...]:
    """The sites of a model; none where the run begins from an adapter, which brings its own.

    ``trunk`` are the top modules beside which a head is trained whole, unless ``modules_to_save``
    says what is. A kernel of that head is the method's only where ``target_modules`` names it.
    """
    if options.init_adapter:
        return ()
    kernels, everything = all_targets(model)
    head = [t for t in everything if trunk and first(t.path) not in trunk]
    return sites_among(options, kernels, everything, head)


def sites_among(
    options: AdapterOptions,
    kernels: Sequence[Target],
    everything: Sequence[Target],
    head: Sequence[Target] = (),
) -> tuple[Site, ...]:
    """The same where it is known what there is: the kernels, all parameters, those of the head."""
    method = options.adapter_method()
    from_these = everything if method.adapts_any_array else kernels
    chosen = select(from_these, options.include(), options.exclude_modules)
    if save := options.modules_to_save:
        whole = select(everything, one_or_names(save))
    else:
        named = chosen if options.target_modules else ()
        whole = tuple(target for target in head if target not in named)
        chosen = tuple(target for target in chosen if target not in whole)
    if options.budget is None:
        return plan_sites(method, chosen, options.parsed_overrides(), whole)
    sites = (*within(method, chosen, options.budget), *plan_sites(method, (), {}, whole))
    check_sites(sites)
    return sites
