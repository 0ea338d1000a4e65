"""What a layer keeps for the backward pass, by name; what it does not keep is computed again."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from lora_mini_jax.algebra import joint
from lora_mini_jax.models import splash_attention
from lora_mini_jax.settings.checks import require_choice
from lora_mini_jax.settings.choices import Remat

_policies = jax.checkpoint_policies
_both = _policies.save_from_both_policies
_kernels = _policies.save_only_these_names(joint.KEPT, splash_attention.KEPT)
POLICIES: dict[str, Callable[..., Any] | None] = {
    "dots": _both(_policies.dots_saveable, _kernels),
    "dots_no_batch": _both(_policies.dots_with_no_batch_dims_saveable, _kernels),
    "full": None,
}
"""What `jax.checkpoint` is told, for every name but ``"none"``."""


def rematted(block: Any, remat: str, *, scan: bool) -> Any:
    """The class of a layer, so that it keeps no more than ``remat`` says.

    Args:
        block: a module's class.
        remat: one of `Remat`.
        scan: whether ``nn.scan`` runs it. XLA cannot merge the recomputation away in a loop, so
            the costly barrier against that can go.

    Raises:
        UserError: another name.
    """
    require_choice("remat", remat, Remat)
    if remat == "none":
        return block
    return nn.remat(block, prevent_cse=not scan, policy=POLICIES[remat])
