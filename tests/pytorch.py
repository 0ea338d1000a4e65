"""PyTorch and what runs on it, to compare with. In CI it is an error that they are not there;
elsewhere the tests that ask for them are skipped."""

import os

import pytest

if os.environ.get("CI"):
    import peft
    import torch
    import transformers
else:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

__all__ = ["peft", "torch", "transformers"]
