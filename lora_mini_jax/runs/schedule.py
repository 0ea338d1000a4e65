"""The learning rate by step, and the optimiser that follows it."""

from collections.abc import Iterable
from dataclasses import replace

import optax

from lora_mini_jax.adapters.sites import Site, methods_of
from lora_mini_jax.options import Training
from lora_mini_jax.training.optim import scale_by_element_adam, scale_leaves


def learning_rate(options: Training, steps: int) -> optax.Schedule:
    """The learning rate by step: a linear warm-up, then the schedule the options name; and what
    the method makes of it."""
    warmup = round(options.warmup_ratio * steps)
    rest, peak = max(1, steps - warmup), options.learning_rate
    falls: dict[str, optax.Schedule] = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }
    rise = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    rate = optax.join_schedules([rise, falls[options.schedule]], [warmup])
    return options.adapter_method().rate(rate, options.warmup_ratio)


def optimizer(
    options: Training, steps: int, sites: tuple[Site, ...], lora_plus_ratio: float = 1.0
) -> optax.GradientTransformation:
    """AdamW with the schedule, after clipping by the norm of the trained leaves' gradients.

    Args:
        options: the run's.
        steps: how many updates there will be.
        sites: what is adapted; where a method restarts entries, each has a counter of its own.
        lora_plus_ratio: LoRA+'s factor on the learning rate of every ``B``.
    """
    restarting = {site.target.path for site in sites if site.method.restarts}
    return optax.chain(
        optax.clip_by_global_norm(options.max_grad_norm),
        scale_by_element_adam(kernels=restarting) if restarting else optax.scale_by_adam(),
        optax.add_decayed_weights(options.weight_decay),
        *([] if lora_plus_ratio == 1 else [scale_leaves({"B": lora_plus_ratio})]),
        optax.scale_by_learning_rate(learning_rate(options, steps)),
    )


def of_length(sites: Iterable[Site], steps: int, given: Iterable[str]) -> tuple[Site, ...]:
    """The sites with methods whose own schedule has a length (``total_steps``) told of the run's,
    unless ``given``, the names of the settings that the user gave, has it.

    Raises:
        UserError: a run too short for the method's other settings.
    """
    found = []
    for site in sites:
        method = site.method
        if "total_steps" in method.field_names() and "total_steps" not in given:
            method = method.with_settings({"total_steps": steps})
        found.append(replace(site, method=method))
    return tuple(found)


def length_notes(sites: Iterable[Site], steps: int) -> list[str]:
    """What the methods note of a run of so many steps, each once."""
    return list(dict.fromkeys(note for m in methods_of(sites) for note in m.notes(steps)))
