"""What a benchmark ran on, and with what: written beside its numbers."""

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

import lora_mini_jax as lmj

PACKAGES = ("jax", "jaxlib", "flax", "optax", "qwix", "torch", "peft", "transformers")


def about() -> dict[str, Any]:
    """The device, settings of the C library's memory, and versions."""
    return {"device": device(), "allocator": allocator(), "versions": versions()}


def device() -> str:
    """What the rows run on, PyTorch's too where that is another."""
    kind = jax.devices()[0].device_kind
    torch = sys.modules.get("torch")
    other = torch and torch.cuda.is_available() and torch.cuda.get_device_name()
    return f"{kind}, PyTorch on {other}" if other and other != kind else kind


def allocator() -> dict[str, str]:
    """What the environment says of the C library's memory: an allocator of another's, or settings.
    Only at the start of a process is it read."""
    known = "LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_", "TCMALLOC_"
    return {name: value for name, value in os.environ.items() if name.startswith(known)}


def versions() -> dict[str, str]:
    """Of Python, this package, and whatever else is measured and installed."""
    found = {"python": platform.python_version(), "lora_mini_jax": lmj.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def page_faults() -> int:
    """How often the system has given this process a page of memory, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
