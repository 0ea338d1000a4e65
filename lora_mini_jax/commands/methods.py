"""Every method there is, for a terminal."""

from dataclasses import MISSING, fields

from lora_mini_jax.errors import flag
from lora_mini_jax.method import Method
from lora_mini_jax.methods import METHODS
from lora_mini_jax.options import Methods


def run_methods(options: Methods) -> None:
    """Print every method with what it is, its settings and their defaults."""
    for name, method in METHODS.items():
        shown = [n for n in method.field_names() if n != "dropout" or method.takes_dropout]
        flags = [f"{flag(n)}{_default(method, n)}" for n in shown]
        summary = (method.__doc__ or "").partition("\n")[0].replace("``", "")
        print(f"{name}: {summary}\n    {'  '.join(flags) or '(no settings)'}")


def _default(method: type[Method], name: str) -> str:
    """What a setting is that nobody gives, after a space; and what it is where there is data."""
    (default,) = (field.default for field in fields(method) if field.name == name)
    if default is MISSING or default is None:
        return ""
    with_data = method.with_data({})
    return f" {default}" + (f" (finetune: {with_data[name]})" if name in with_data else "")
