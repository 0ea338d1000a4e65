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

from lora_mini_jax.adapters.adapter import Adapter, draw
from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.algebra.decompositions import orthonormal, top_singular
from lora_mini_jax.algebra.low_rank import Product
from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Factors, Method
from lora_mini_jax.methods.full import Full
from lora_mini_jax.training.gradient import LossFn, parted
from lora_mini_jax.tree import Target, float32, kernels_of, over_lead

PASSES = 3
"""Over the batches: one finds a space, the next betters it, the last one looks inside it."""
SPARE = 8
"""Vectors that are looked for beyond those that are used: they make the others exact sooner."""


def calibrate(
    adapter: Adapter, params: Any, loss_fn: LossFn, batches: Iterable[Any], *, has_aux: bool = False
) -> Adapter:
    """The adapter with the frozen factors of methods that take them from data.

    Runs the unadapted model over ``batches``, forward and backward (three times, for singular
    vectors of gradients), and hands each method what it wants to see: of the summed gradient of its
    kernel or of the second moment of the kernel's inputs. Methods that need no data stay as they
    are; where none does, nothing is run.

    Args:
        adapter: freshly drawn.
        params: the base parameters.
        loss_fn: as for `make_train_step`.
        batches: a few training batches.
        has_aux: whether ``loss_fn`` returns ``(loss, aux)``.

    Raises:
        UserError: no batch, or a loss that is no number.

    Example:
        >>> import flax.linen as nn
        >>> from lora_mini_jax import LoRAMini, init, linen
        >>> model, x = nn.Dense(8), jnp.ones((4, 16))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> method = LoRAMini(rank=2, a=4, b=4, outer_init="gradient")
        >>> adapter = init(params, method, linen.targets(model, params, x))
        >>> apply = linen.adapt(model)
        >>> made = calibrate(adapter, params, lambda p, a, x, key: apply(p, a, x).mean(), [x])
        >>> made.frozen["kernel"]["A_aux"].shape
        (16, 4)
    """
    sites = [s for s in adapter.sites if s.method.needs_data and not s.owner]
    if not sites:
        return adapter
    batches = list(batches)
    if not batches:
        raise UserError("factors that come from data need at least one batch")
    found = _seen(sites, params, loss_fn, batches, has_aux)
    kernels, frozen = kernels_of(params, [s.target for s in sites]), dict(adapter.frozen)
    for site in sites:
        path = site.target.path
        made = _make(site.method, site.target.anywhere, kernels[path], found[path])
        frozen[path] = jax.block_until_ready(made)  # one program at a time, see `_summed_gradient`
    return replace(adapter, frozen=frozen)


@partial(jax.jit, static_argnums=(0, 1))
def _make(method: Method, target: Target, kernel: Any, seen: Factors) -> Factors:
    return over_lead(method.from_data, len(target.lead))(target.matrix(kernel), seen)


def _seen(sites: list[Site], params: Any, loss_fn: Any, batches: list[Any], has_aux: bool) -> Any:
    """What `Method.from_data` gets, by path: singular vectors of gradients by a randomised subspace
    iteration (Halko, Martinsson and Tropp, arXiv 0909.4061), whose every step is a pass over the
    batches with two thin matrices beside each kernel; no whole gradient is ever in memory."""
    gradient = _summed_gradient(params, loss_fn, has_aux)
    probes = draw(params, tuple(Site(site.target, _probe(site)) for site in sites), 0)
    found = gradient(probes, batches)
    if any(site.method.gradient_rank for site in sites):
        for _ in range(PASSES - 1):
            probes = probes.with_trainable(_turned(probes, found, _orthonormal))
            found = gradient(probes, batches)
    return _turned(probes, found, _singular)


def _summed_gradient(params: Any, loss_fn: LossFn, has_aux: bool) -> Any:
    """``sums(probes, batches)``: the probes' gradient, summed over the batches.

    Every program takes the result of the one before it. Programs that several processes run, and
    that may overlap, could wait for each other for ever.
    """

    @jax.jit
    def added(total: Any, probes: Adapter, params: Any, batch: Any) -> Any:
        def loss(trainable: Any) -> jax.Array:
            out = loss_fn(params, probes.with_trainable(trainable), batch, jax.random.key(0))
            return parted(out, has_aux)[0]

        return jax.tree.map(jnp.add, total, jax.grad(loss)(probes.trainable))

    def sums(probes: Adapter, batches: list[Any]) -> Any:
        total = jax.jit(partial(jax.tree.map, jnp.zeros_like))(probes.trainable)
        for batch in batches:
            total = added(total, probes, params, batch)
        return jax.block_until_ready(total)

    return sums


@partial(jax.jit, static_argnums=2)
def _turned(probes: Adapter, found: Any, turn: Any) -> dict[str, Factors]:
    """``turn`` of what was found at every kernel whose gradient is looked for."""
    turned = dict(found)
    for site in probes.sites:
        if isinstance(site.method, _Gradient):
            path, lead = site.target.path, len(site.target.lead)
            turned[path] = over_lead(turn, lead)(probes.trainable[path], found[path])
    return turned


def _orthonormal(thin: Factors, found: Factors) -> Factors:
    """The two sides for the next pass."""
    left, right = found["left"], found["right"]
    return {"left": orthonormal(left), "right": orthonormal(right.T).T}


def _singular(thin: Factors, found: Factors) -> Factors:
    """The singular vectors: ``right`` found with orthonormal ``left`` is ``left^T G``."""
    u, _, vt = top_singular(found["right"], len(found["right"]))
    return {"left": thin["left"] @ u, "right": vt}


def _probe(site: Site) -> Method:
    """What looks for what a site's method wants to see."""
    rank = site.method.gradient_rank
    if not rank:
        return _Moment()
    return _Gradient(min(rank + SPARE, site.target.n_in, site.target.n_out))


@dataclass(frozen=True)
class _Gradient(Product):
    """Adds 0. With ``G`` the kernel's gradient, that of ``left (in, rank)`` is ``G right^T``, and
    that of ``right (rank, out)`` is ``left^T G``."""

    name = "gradient-probe"

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        drawn = zip(jax.random.split(key), kernel.shape, strict=True)
        left, right = (orthonormal(jax.random.normal(k, (n, self.rank))) for k, n in drawn)
        return {"left": left, "right": right.T}, {}

    def chain(self, factors: Factors) -> tuple[jax.Array, ...]:
        return factors["left"], factors["right"]

    def delta(self, x: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        y = super().delta(jax.lax.stop_gradient(x), kernel, factors)
        return y - jax.lax.stop_gradient(y)

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return self.rank * (n_in + n_out)


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
class _Moment(Full):
    """Changes nothing; the gradient of ``moment`` is the inputs' second moment."""

    name = "moment-probe"

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        dense, _ = super().init(key, kernel)
        return {"moment": jnp.zeros((kernel.shape[0],) * 2, jnp.float32)}, dense

    def delta(self, x: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        nothing = _nothing(x, factors["moment"])
        return jnp.broadcast_to(nothing[..., None], (*x.shape[:-1], kernel.shape[-1]))
