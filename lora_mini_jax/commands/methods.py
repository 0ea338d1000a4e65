"""Every method there is, for a terminal."""

from dataclasses import MISSING, fields

from lora_mini_jax.methods import METHODS
from lora_mini_jax.options import Methods


def run_methods(options: Methods) -> None:
    """Print every method with what it is, its settings and their defaults."""
    for name, method in METHODS.items():
        defaults = {f.name: "" if f.default is MISSING else f" {f.default}" for f in fields(method)}
        flags = [f"--{n.replace('_', '-')}{defaults[n]}" for n in method.field_names()]
        summary = (method.__doc__ or "").partition("\n")[0].replace("``", "")
        print(f"{name}: {summary}\n    {'  '.join(flags)}")
