"""Which axes of a method's leaves run along the kernel's inputs, and which along its outputs."""

from functools import lru_cache

import jax
import jax.numpy as jnp

from lora_mini_jax.method import Method


@lru_cache(maxsize=1024)
def runs_along(method: Method, n_in: int, n_out: int) -> dict[str, tuple[str, ...]]:
    """What each axis of each leaf runs along: ``"in"``, ``"out"``, or ``""`` for neither.

    Nobody has to say so: an axis runs along the inputs if it is twice as long for a kernel with
    twice the inputs, be the kernel wide or tall. Both are tried, for an axis of ``min(in, out)``
    grows with the inputs of a wide kernel too, but not with those of a tall one.
    """

    def shapes(n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        kernel = jax.ShapeDtypeStruct((n_in, n_out), jnp.float32)
        trainable, frozen = jax.eval_shape(method.init, jax.random.key(0), kernel)
        return {name: leaf.shape for name, leaf in (trainable | frozen).items()}

    # One side is made longer than the other by more than any size a method may derive from both,
    # so that `min(in, out)` is the short side here and, doubled, still is.
    most = max(n_in, n_out)
    wide, tall = (n_in, n_out * most * 2), (n_in * most * 2, n_out)
    once = [shapes(*size) for size in (wide, tall)]
    longer = [shapes(2 * i, o) for i, o in (wide, tall)]
    broader = [shapes(i, 2 * o) for i, o in (wide, tall)]

    def side(name: str, axis: int) -> str:
        for word, twice in (("in", longer), ("out", broader)):
            if all(
                b[name][axis] == 2 * a[name][axis] > 0 for a, b in zip(once, twice, strict=True)
            ):
                return word
        return ""

    return {name: tuple(side(name, i) for i in range(len(shape)))
            for name, shape in once[0].items()}  # fmt: skip
