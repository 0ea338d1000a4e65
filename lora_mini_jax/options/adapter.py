"""The options that say which adapter a model gets: shared by several commands."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_mini_jax.errors import UserError

if TYPE_CHECKING:
    from lora_mini_jax.method import Method

BASE = str(Path(__file__).parents[1] / "base")
"""The small model inside the package."""

METHOD_SETTINGS = ("rank", "alpha", "a", "b", "outer_init")
"""The options that are the method's own, each None where the method's default is meant."""


@dataclass(frozen=True)
class AdapterOptions:
    """A model, a method with its settings, and the kernels it adapts."""

    model: str = BASE
    """A Llama in Hugging Face layout (config.json, safetensors, tokenizer.json), or a hub id."""
    method: str = "lora-mini"
    """lora-mini or lora."""
    rank: int | None = None
    """Inner width; by default the method's own."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; by default the method's own."""
    a: int | None = None
    """LoRA-Mini: width of the frozen factor on the input side."""
    b: int | None = None
    """LoRA-Mini: width of the frozen factor on the output side."""
    outer_init: str | None = None
    """LoRA-Mini: how the frozen factors are drawn: normal, fan_in, orthogonal or svd."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """all-linear, or names such as q_proj v_proj, or one regular expression on the whole path."""
    exclude_modules: tuple[str, ...] = ()
    """Names to leave out."""
    overrides: str = "{}"
    """JSON: other settings for some kernels, by regular expression: {"mlp": {"rank": 4}}."""

    def __post_init__(self) -> None:
        self.adapter_method()
        self.parsed_overrides()

    def adapter_method(self) -> "Method":
        """The method with the given settings; one that the method does not have is an error."""
        from lora_mini_jax.methods import from_dict  # imports jax, which --help can do without

        given = {n: getattr(self, n) for n in METHOD_SETTINGS}
        settings = {name: value for name, value in given.items() if value is not None}
        return from_dict({"method": self.method, **settings})

    def parsed_overrides(self) -> dict[str, dict[str, Any]]:
        """``overrides`` as a dict of dicts."""
        try:
            value = json.loads(self.overrides)
        except json.JSONDecodeError as error:
            raise UserError(f"--overrides is not JSON: {error}") from None
        if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
            raise UserError('--overrides must be like {"mlp": {"rank": 4}}')
        return value

    def include(self) -> str | tuple[str, ...]:
        """``target_modules`` as `tree.select` wants it: one word is a pattern, more are names."""
        one = self.target_modules[0] if len(self.target_modules) == 1 else None
        return one if one else self.target_modules
