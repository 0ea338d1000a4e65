"""PEFT's VeRA. Here every kernel has its own part of the random factors, PEFT has two for all."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Factors, Method
from lora_mini_jax.methods import VeRA
from lora_mini_jax.peft.kinds.kind import Arrays, Kind, Leaf, swap


class VeraKind(Kind):
    """``VERA``, whose file holds the random factors too."""

    peft_type = "VERA"
    leaves: ClassVar = {VeRA: {"d": Leaf("vera_lambda_d"), "b": Leaf("vera_lambda_b")}}
    settings = ("r", "d_initial", "vera_dropout", "save_projection", "init_weights",
                "fan_in_fan_out")  # fmt: skip
    required = ("r",)
    only_bias = "vera_only"
    shared = ("vera_A", "vera_B")

    def to_config(self, method: Any) -> dict[str, Any]:
        own = {"r": method.rank, "d_initial": method.d_initial, "vera_dropout": method.dropout}
        return {**own, "save_projection": True}

    def of_config(self, config: Mapping[str, Any], module: str) -> Method:
        start, dropout = config.get("d_initial", 0.1), config.get("vera_dropout", 0.0)
        return VeRA(config["r"], start, dropout=dropout)

    def gather(self, kernels: Mapping[str, Factors]) -> tuple[Arrays, Mapping[str, Factors]]:
        """``{"vera_A": (r, in), "vera_B": (out, r)}``, and the leaves with another ``d``.

        The factors are those of the widest kernel, of which the others take the first rows and
        columns; ours are drawn with a bound that depends on the kernel's ``in``, and ``d`` makes up
        for that.

        Raises:
            UserError: kernels that share no factors.
        """
        own = {path: {"A": np.asarray(factors["A"]), "B": swap(np.asarray(factors["B"]))}
               for path, factors in kernels.items()}  # fmt: skip
        shared, scales = {}, dict.fromkeys(own, 1.0)
        for name in "AB":
            widest = max((f[name] for f in own.values()), key=lambda a: a.shape[-2])
            whole = widest.reshape(-1, *widest.shape[-2:])[0]
            for path, factors in own.items():
                scales[path] *= _multiple(factors[name], whole, path)
            shared[f"vera_{name}"] = np.ascontiguousarray(whole if name == "B" else whole.T)
        return shared, {path: {**factors, "d": factors["d"] * scales[path]}
                        for path, factors in kernels.items()}  # fmt: skip

    def least_shapes(self, method: Any, n_in: int, n_out: int) -> dict[str, tuple[int, int]]:
        return {"vera_A": (method.rank, n_in), "vera_B": (n_out, method.rank)}

    def scatter(self, shared: Arrays, lead: tuple[int, ...], n_in: int, n_out: int) -> Arrays:
        own = {"A": shared["vera_A"][:, :n_in].T, "B": shared["vera_B"][:n_out].T}
        return {name: np.broadcast_to(part, (*lead, *part.shape)) for name, part in own.items()}


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
