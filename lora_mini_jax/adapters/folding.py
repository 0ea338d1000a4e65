"""Any update that is a product of thin matrices, as a plain LoRA."""

from functools import partial

import jax
import jax.numpy as jnp

from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Factors, Method
from lora_mini_jax.methods import LoRA
from lora_mini_jax.tree import Target, over_lead


def fold(method: Method, factors: Factors, target: Target) -> tuple[LoRA, Factors]:
    """The plain LoRA that is the same function, its scale 1: ``lora_alpha = r``.

    Servers take the scale to be ``lora_alpha / r``, whatever else the config says.

    Args:
        method: what adapts the kernel.
        factors: its leaves, of all stacked matrices.
        target: the kernel.

    Raises:
        UserError: an update that is no product of thin matrices.
    """
    thin = partial(_thin, method, target)
    left, right = over_lead(thin, len(target.lead))(factors)
    rank = left.shape[-1]
    return LoRA(rank, alpha=float(rank), dropout=method.dropout), {"A": left, "B": right}


def padded(factors: Factors, rank: int) -> Factors:
    """A LoRA's factors at a higher rank, by zeros: the same function."""
    more = rank - factors["A"].shape[-1]
    none = [(0, 0)] * (factors["A"].ndim - 2)
    return {"A": jnp.pad(factors["A"], [*none, (0, 0), (0, more)]),
            "B": jnp.pad(factors["B"], [*none, (0, more), (0, 0)])}  # fmt: skip


def _thin(method: Method, target: Target, factors: Factors) -> tuple[jax.Array, jax.Array]:
    found = method.thin(factors, target.n_in, target.n_out)
    if found is None:
        raise UserError(
            f"the update of {method.name}, {method}, is no product of thin matrices, so no LoRA "
            "equals it: merge it into the model (merge, then models.save), or for PEFT leave out "
            "as_lora where it has the method"
        )
    return found
