"""What has a name and hyper-parameters: read from words, changed by name, written as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self, get_type_hints

from lora_mini_jax.errors import UserError


@dataclass(frozen=True)
class Settings:
    """A frozen dataclass whose fields are settings."""

    name: ClassVar[str]
    """What the command line and saved files call it."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the fields, with the method's name under ``"method"``."""
        values = {name: getattr(self, name) for name in self.field_names()}
        plain = {n: v.to_dict() if isinstance(v, Settings) else v for n, v in values.items()}
        return {"method": self.name, **plain}

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        """The same method with other hyper-parameters, by name.

        Raises:
            UserError: a setting that the method does not have, or a value it does not allow.
        """
        return replace(self, **self.checked(settings))

    @classmethod
    def checked(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings with numbers of the fields' own types; an unknown name is a `UserError`."""
        if unknown := sorted(set(settings) - set(cls.field_names())):
            raise UserError(
                f"{cls.name} has no option {', '.join(unknown)}: choose from "
                f"{', '.join(cls.field_names())}"
            )
        # JSON writes 16.0 as 16; the two must be one method, and one compiled program.
        hints = get_type_hints(cls)
        return {n: float(v) if type(v) is int and hints[n] is float else v
                for n, v in settings.items()}  # fmt: skip

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The hyper-parameters there are, those that every method has last."""
        return tuple(f.name for f in sorted(fields(cls), key=lambda f: f.kw_only is True))
