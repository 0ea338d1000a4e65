"""A user's own program in several processes that JAX has made meet: one writes, for all."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_mini_jax.files import writes
from tests.conftest import CHEAPLY

PROGRAM = """
import sys
import jax
from lora_mini_jax.files import writes
assert writes()  # which starts no device, or the processes could not meet any more
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jax.numpy as jnp
import lora_mini_jax as lmj
assert writes() == (jax.process_index() == 0)
config = lmj.models.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
                                num_hidden_layers=1, num_attention_heads=1)
model = lmj.models.Llama(config)
params = model.init(jax.random.key(0), jnp.zeros((1, 2), int))["params"]
targets = lmj.linen.targets(model, params, jnp.zeros((1, 2), int))
for i in range(10):
    adapter = lmj.init(params, lmj.LoRA(rank=2), targets, key=i)
    lmj.save("adapter", adapter, params)
    assert (lmj.load("adapter", params).key == adapter.key).all()
    lmj.models.save(f"model{i}", model, params)
    lmj.models.load(f"model{i}")
"""


def test_a_program_alone_writes():
    assert writes()


@pytest.mark.slow
def test_two_processes_save_into_one_folder(tmp_path):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    home = str(Path(__file__).parents[1])
    flags = f"{CHEAPLY} --xla_force_host_platform_device_count=1"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(i)],
            cwd=tmp_path,
            env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": home},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    folders = {"adapter", *(f"model{i}" for i in range(10))}
    assert {path.name for path in tmp_path.iterdir()} == folders  # and nothing half-written
    first, last = (load_file(tmp_path / f"model{i}" / "model.safetensors") for i in (0, 9))
    assert all(np.array_equal(first[name], last[name]) for name in first)
