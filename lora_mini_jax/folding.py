"""Any update that is a product of thin matrices, as a plain LoRA."""

from functools import partial, reduce

import jax
import jax.numpy as jnp

from lora_mini_jax.errors import UserError
from lora_mini_jax.low_rank import Product
from lora_mini_jax.method import Factors, Method
from lora_mini_jax.methods import LoRA, MiSS
from lora_mini_jax.methods.diffora import DiffoRA
from lora_mini_jax.tree import Target, float32, over_lead


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
    """One matrix's update as ``(in, r) @ (r, out)``, in float32."""
    if isinstance(method, DiffoRA):
        left, right = _thin(method.inner, target, factors)
        return left, method.opening(factors) * right
    if isinstance(method, MiSS) and method.mode != "bat":
        rows = jax.nn.one_hot(jnp.arange(target.n_in) % method.rank, method.rank)
        d = factors["D"]
        return rows, jnp.tile(d, (1, target.n_out // d.shape[1]))
    if not (isinstance(method, Product) and _is_its_chain(type(method))):
        raise UserError(_refusal(method))
    chain = [float32(matrix) for matrix in method.chain(factors)]
    widths = [matrix.shape[1] for matrix in chain[:-1]]
    cut = 1 + widths.index(min(widths))
    with jax.default_matmul_precision("highest"):
        return reduce(jnp.matmul, chain[:cut]), reduce(jnp.matmul, chain[cut:])


def _is_its_chain(kind: type[Product]) -> bool:
    """Whether the whole update is the product of the chain: no dense part, no gain."""
    return kind.update is Product.update and kind.merge is Product.merge


def _refusal(method: Method) -> str:
    mode = " in mode bat" if isinstance(method, MiSS) else ""
    return (
        f"the update of {method.name}{mode} is no product of thin matrices, so no LoRA equals it: "
        "merge it into the model (merge, then models.save), or for PEFT leave out as_lora where it "
        "has the method"
    )
