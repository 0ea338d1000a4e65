"""Our leaves and PEFT's tensors of one kernel: the same numbers under other names."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_mini_jax.method import Method
from lora_mini_jax.methods import LoRA, LoRAFA, MiSS, VeRA
from lora_mini_jax.methods.adalora import AdaLoRA
from lora_mini_jax.methods.dora import DoRA


class Leaf(NamedTuple):
    """PEFT's name for a leaf, and how to get there and back; leading axes are left alone."""

    name: str
    there: Callable[[Any], Any] = lambda x: x
    back: Callable[[Any], Any] = lambda x: x


def _swap(x: Any) -> Any:
    return x.swapaxes(-1, -2)


_LORA = {"A": Leaf("lora_A", _swap, _swap), "B": Leaf("lora_B", _swap, _swap)}
LEAVES: dict[type[Method], dict[str, Leaf]] = {
    LoRA: _LORA,
    LoRAFA: _LORA,
    DoRA: {**_LORA, "magnitude": Leaf("lora_magnitude_vector")},
    AdaLoRA: {**_LORA, "E": Leaf("lora_E", lambda e: e[..., None], lambda e: e[..., 0])},
    MiSS: {"D": Leaf("miss_block")},
    VeRA: {"d": Leaf("vera_lambda_d"), "b": Leaf("vera_lambda_b")},
}
"""What PEFT keeps of each method that it has too, by our names."""


@cache
def tensor_shapes(method: Method, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
    """The shapes of PEFT's tensors for one kernel ``(in, out)``, by PEFT's names."""
    kernel = jax.ShapeDtypeStruct((n_in, n_out), jnp.float32)
    trainable, frozen = jax.eval_shape(method.init, jax.random.key(0), kernel)
    own = {**frozen, **trainable}
    return {leaf.name: jax.eval_shape(leaf.there, own[name]).shape
            for name, leaf in LEAVES[type(method)].items()}  # fmt: skip
