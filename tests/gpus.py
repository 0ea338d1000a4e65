"""A GPU that is not there, as far as JAX tells of one."""

from types import SimpleNamespace

import pytest

from lora_mini_jax import hardware


def pretend(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    """Programs are made for an NVIDIA GPU of this compute capability."""
    client = SimpleNamespace(platform_version="PJRT C API\ncuda 13000")
    gpu = SimpleNamespace(platform="gpu", client=client, compute_capability=capability)
    monkeypatch.setattr(hardware, "device", lambda: gpu)
