"""The options that say which adapter a model gets: shared by several commands."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from lora_mini_jax.errors import UserError, flag
from lora_mini_jax.settings.spec import parse_settings, to_pairs

if TYPE_CHECKING:
    from lora_mini_jax.method import Method

BASE = str(Path(__file__).parents[1] / "base")
"""The small model inside the package."""


@dataclass(frozen=True)
class MethodOptions:
    """A method with its settings."""

    method: str = "lora-mini"
    """What adapts the kernels; `lora-mini methods` lists the methods and their settings."""
    settings: tuple[str, ...] = ()
    """The method's own settings, rank=4 a=32; or each as a flag of its own: --rank 4 --a 32."""

    def __post_init__(self) -> None:
        # In one order, so that a run is the same run however its settings were given.
        given = self.parsed_settings()
        settings = to_pairs(dict(sorted(given.items())))
        if "method" in given:  # which `--method` would outdo in silence
            raise UserError(f"{self.method} has no option method: a method is named, not set")
        object.__setattr__(self, "settings", settings)
        self.adapter_method()

    def adapter_method(self) -> "Method":
        """The method with the given settings; one that the method does not have is an error."""
        from lora_mini_jax.methods import from_dict  # imports jax, which --help can do without

        return from_dict({**self.parsed_settings(), "method": self.method})

    def parsed_settings(self) -> dict[str, Any]:
        """``settings`` as a dict."""
        return parse_settings(self.settings, " ".join(self.settings))

    @staticmethod
    def setting_kinds() -> dict[str, Any]:
        """The settings that some method has, and what each is annotated with."""
        from lora_mini_jax.methods import METHODS

        hints = [(method, get_type_hints(method)) for method in METHODS.values()]
        return {name: kinds[name] for method, kinds in hints for name in method.field_names()}


@dataclass(frozen=True)
class AdapterOptions(MethodOptions):
    """A model, a method with its settings, and the kernels it adapts."""

    model: str = BASE
    """A model in Hugging Face layout (config.json, safetensors, tokenizer.json), or a hub id.
    Without it, the small demo model in the package is used."""
    target_modules: tuple[str, ...] = ()
    """all-linear, all, bias-only, head-only; or one word, a regular expression that is searched for
    in the whole path; or two or more, exact names such as q_proj v_proj. By default the method's
    own, mostly all-linear."""
    exclude_modules: tuple[str, ...] = ()
    """Exact names to leave out."""
    modules_to_save: tuple[str, ...] = ()
    """Parameters to train whole beside the method, by names or one regular expression."""
    overrides: str = "{}"
    """JSON: other settings for some kernels, by regular expression: {"mlp": {"rank": 4}}."""

    budget: int | None = None
    """Choose the method's size (its rank; of LoRA-Mini a and b too) so that at most this many
    parameters are trained, those of modules_to_save apart."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parsed_overrides()
        if self.budget is not None:
            self._check_budget(self.budget)

    def adapter_method(self) -> "Method":
        """The method with the given settings, and with what it does better where there is data to
        train on."""
        from lora_mini_jax.methods import from_dict

        return from_dict({**self.parsed_settings(), "method": self.method}, with_data=True)

    def _check_budget(self, budget: int) -> None:
        """A budget chooses sizes, so that nothing else may."""
        if budget < 1:
            raise UserError(f"--budget {budget} is not allowed: give a whole number from 1")
        if self.parsed_overrides():
            raise UserError(f"--budget {budget} chooses one size for all kernels: leave out "
                            "--overrides")  # fmt: skip
        if chosen := sorted(self.parsed_settings().keys() & self.adapter_method().sizes()):
            raise UserError(f"--budget {budget} chooses {', '.join(map(flag, chosen))}: leave out "
                            "the one or the other")  # fmt: skip

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
        """``target_modules``, or the method's own default."""
        return one_or_names(self.target_modules) or self.adapter_method().default_targets


def one_or_names(words: tuple[str, ...]) -> str | tuple[str, ...]:
    """Words as `selection.select` wants them: one is a preset or a pattern, more are names."""
    return words[0] if len(words) == 1 else words
