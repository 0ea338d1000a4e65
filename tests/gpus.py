"""A GPU that is not there, as far as JAX tells of one."""

from types import SimpleNamespace

import jax
import pytest

from lora_mini_jax import hardware


def pretend(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    """Programs are made for an NVIDIA GPU of this compute capability."""
    client = SimpleNamespace(platform_version="PJRT C API\ncuda 13000")
    gpu = SimpleNamespace(platform="gpu", client=client, compute_capability=capability)
    monkeypatch.setattr(hardware, "device", lambda: gpu)


def pretend_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are made for the TPU of a machine that has one."""
    monkeypatch.setattr(hardware, "device", lambda: SimpleNamespace(platform="tpu"))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
