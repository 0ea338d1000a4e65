"""VeRA's random factors: here every kernel has its own part, PEFT has two for all kernels."""

from collections.abc import Mapping

import numpy as np

from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Factors

NAMES = {"A": "vera_A", "B": "vera_B"}


def shared(kernels: Mapping[str, Factors]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """PEFT's two factors, and by how much each kernel's ``d`` must be multiplied with them.

    The factors are those of the widest kernel, of which the others take the first rows and columns;
    ours are drawn with a bound that depends on the kernel's ``in``, hence the multiples.

    Args:
        kernels: the leaves by path, ``A (*lead, in, r)`` and ``B (*lead, r, out)`` among them.

    Returns:
        ``{"vera_A": (r, in), "vera_B": (out, r)}``, float32, and a number by path.

    Raises:
        UserError: kernels that share no factors.
    """
    own = {path: {"A": np.asarray(factors["A"]), "B": np.asarray(factors["B"]).swapaxes(-1, -2)}
           for path, factors in kernels.items()}  # fmt: skip
    widest, scales = {}, dict.fromkeys(own, 1.0)
    for name in NAMES:
        widest[name] = max((f[name] for f in own.values()), key=lambda a: a.shape[-2])
        whole = widest[name].reshape(-1, *widest[name].shape[-2:])[0]
        for path, factors in own.items():
            scales[path] *= _multiple(factors[name], whole, path)
        widest[name] = np.ascontiguousarray(whole if name == "B" else whole.T)
    return {NAMES[name]: whole for name, whole in widest.items()}, scales


def frozen(whole: Mapping[str, np.ndarray], lead: tuple[int, ...], n_in: int, n_out: int) -> dict:
    """One kernel's part of PEFT's factors: ``A (*lead, in, r)`` and ``B (*lead, r, out)``."""
    a, b = whole["vera_A"][:, :n_in].T, whole["vera_B"][:n_out].T
    return {"A": np.broadcast_to(a, (*lead, *a.shape)), "B": np.broadcast_to(b, (*lead, *b.shape))}


def _multiple(part: np.ndarray, whole: np.ndarray, path: str) -> float:
    """The number by which the first rows of ``whole`` are ``part``."""
    same = whole[: part.shape[-2]]
    if part.shape[-1] == same.shape[-1]:
        if (part == same).all():
            return 1.0
        times = float((part * same).sum() / (same**2).sum()) / max(1, part.size // same.size)
        if np.allclose(part, times * same, rtol=1e-4, atol=1e-6):
            return times
    raise UserError(
        f"{path} does not share VeRA's random factors with the other kernels, as PEFT's must: "
        "export it as plain LoRA, as_lora=True"
    )
