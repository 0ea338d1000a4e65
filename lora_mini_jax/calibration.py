"""Frozen factors that come from data: gradients or inputs of the base model on a few batches.

Drawn factors know nothing of the task; these are computed once, before training, and stored with
the adapter, because no key draws them again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.adapter import Adapter, draw
from lora_mini_jax.errors import UserError
from lora_mini_jax.gradient import LossFn
from lora_mini_jax.method import Factors, Method
from lora_mini_jax.methods.full import Full
from lora_mini_jax.plan import Site
from lora_mini_jax.tree import Target, float32, matrices, over_lead


def calibrate(
    adapter: Adapter, params: Any, loss_fn: LossFn, batches: Iterable[Any], *, has_aux: bool = False
) -> Adapter:
    """The adapter with the frozen factors of methods that take them from data.

    Runs the unadapted model over ``batches``, forward and backward, and hands each method the mean
    gradient of its kernel and the summed covariance of the kernel's inputs. Methods that need no
    data stay as they are; where none does, nothing is run.

    Args:
        adapter: freshly drawn.
        params: the base parameters.
        loss_fn: as for `make_train_step`.
        batches: a few training batches.
        has_aux: whether ``loss_fn`` returns ``(loss, aux)``.

    Raises:
        UserError: no batch.
    """
    sites = [s for s in adapter.sites if s.method.needs_data and not s.owner]
    if not sites:
        return adapter
    found = _probed([site.target for site in sites], params, loss_fn, batches, has_aux)
    kernels, frozen = matrices(params, [site.target for site in sites]), dict(adapter.frozen)
    for site in sites:
        path = site.target.path
        seen = found[path]["dense"], found[path]["moment"]
        frozen[path] = _make(site.method, len(site.target.lead), kernels[path], *seen)
    return replace(adapter, frozen=frozen)


@partial(jax.jit, static_argnums=(0, 1))
def _make(method: Method, lead: int, kernel: Any, gradient: Any, moment: Any) -> Factors:
    return over_lead(method.from_data, lead)(kernel, gradient, moment)


def _probed(
    targets: list[Target], params: Any, loss_fn: LossFn, batches: Iterable[Any], has_aux: bool
) -> dict[str, Factors]:
    """The gradient of every kernel and its inputs' second moment, summed over the batches."""
    probes = draw(params, tuple(Site(target, _Probe()) for target in targets), 0)

    @jax.jit
    def gradient(trainable: Any, params: Any, batch: Any) -> Any:
        def loss(trainable: Any) -> jax.Array:
            out = loss_fn(params, probes.with_trainable(trainable), batch, jax.random.key(0))
            return out[0] if has_aux else out

        return jax.grad(loss)(trainable)

    total = None
    for batch in batches:
        one = gradient(probes.trainable, params, batch)
        total = one if total is None else jax.tree.map(jnp.add, total, one)
    if total is None:
        raise UserError("factors that come from data need at least one batch")
    return total


@jax.custom_vjp
def _nothing(x: jax.Array, moment: jax.Array) -> jax.Array:
    """0, whose "gradient" in ``moment`` is the second moment of the rows of ``x``: the one way to
    get a layer's inputs out of a model that goes through ``scan`` and ``remat`` unharmed."""
    return jnp.zeros(x.shape[:-1], x.dtype)


def _forward(x: jax.Array, moment: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _nothing(x, moment), x


def _backward(x: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = float32(x).reshape(-1, x.shape[-1])
    return jnp.zeros_like(x), rows.T @ rows


_nothing.defvjp(_forward, _backward)


@dataclass(frozen=True)
class _Probe(Full):
    """Changes nothing; the gradient of ``dense`` is the kernel's, and that of ``moment`` the
    inputs' second moment."""

    name = "probe"

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        factors, _ = super().init(key, kernel)
        return {**factors, "moment": jnp.zeros((kernel.shape[0],) * 2, jnp.float32)}, {}

    def delta(self, x: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        nothing = _nothing(x, factors["moment"])
        return jnp.broadcast_to(nothing[..., None], (*x.shape[:-1], kernel.shape[-1]))
