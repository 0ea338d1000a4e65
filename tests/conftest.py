"""What must be in the environment before JAX starts: the CPU, and compiling cheaply."""

import gc
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tiny programs: what XLA saves by optimising them it never earns back, and many are the same. The
# newer of its two ways to compile what it fuses takes half of the tests' time; it is the only one
# from jaxlib 0.11 on, which ends the process over a flag that it does not know.
CHEAPLY = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    CHEAPLY += " --xla_cpu_use_fusion_emitters=false"
# Eight devices for tests/test_sharding.py; the others use the first.
os.environ.setdefault("XLA_FLAGS", f"{CHEAPLY} --xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Tokenised data goes nowhere near the user's own; child processes are told so too.
ROWS = tempfile.TemporaryDirectory(prefix="lora-mini-rows-")
os.environ["LORA_MINI_CACHE"] = ROWS.name
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The workers are as many as the cores: threads of their own would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Traced programs are many objects that stay: to look through them all so often takes a twelfth of
# the tests' time.
gc.set_threshold(200_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs are kept for ever otherwise: gigabytes, after some hundred tests."""
    yield
    import jax

    jax.clear_caches()


def pytest_collection_modifyitems(items):
    """The longest first, so that no worker is left alone with one in the end."""
    items.sort(key=lambda item: "slow" not in item.keywords)
