"""Plans for TPUs, by the compiler of TPUs; no TPU is needed, nor is there one."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from lora_mini_jax import UserError, hardware
from lora_mini_jax.cli import main
from lora_mini_jax.commands.forecast import plan_step
from lora_mini_jax.forecast import absent
from lora_mini_jax.models import splash_attention
from lora_mini_jax.models.attention import attend
from lora_mini_jax.options import PlanStep

pytest.importorskip("libtpu")
LAYERS, WIDTH, FF, VOCAB = 4, 128, 256, 512
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
    "hidden_size": WIDTH, "intermediate_size": FF, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 1024,
}  # fmt: skip
LINEAR = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * FF)
SCANNED = {"scan_layers": True, "remat": "full", "dtype": "bfloat16"}
PLANS: dict[str, dict[str, Any]] = {
    "lora-mini": {"mesh": "fsdp=2,tensor=2", "settings": ("rank=4", "a=16", "b=16"), **SCANNED},
    "dora": {"mesh": "fsdp=2,tensor=2", "scan_layers": True},
    "miss": {"mesh": "data=-1", "dtype": "bfloat16"},
    "full": {"mesh": "fsdp=4", **SCANNED},
}


def given(folder: Path, **how: Any) -> PlanStep:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return PlanStep(model=str(folder), batch_size=8, max_length=64, **how)


@pytest.mark.parametrize("method", PLANS)
def test_a_step_compiles_for_tpus_and_takes_what_it_takes_anywhere(method: str, tmp_path: Path):
    how = PLANS[method]
    on_tpu = plan_step(given(tmp_path, method=method, tpu="v5e:2x2", **how))
    how = {**how, "mesh": how["mesh"].replace("-1", "4")}
    on_cpu = plan_step(given(tmp_path, method=method, **how))
    assert [plan["compiled_for"] for plan in (on_tpu, on_cpu)] == ["TPU v5 lite", "cpu"]
    assert on_tpu["devices"] == 4
    compiled = ("temporaries", "total")
    sizes = [{name: size for name, size in plan["bytes_per_device"].items() if name not in compiled}
             for plan in (on_tpu, on_cpu)]  # fmt: skip
    assert sizes[0] == sizes[1]
    exchanged = on_tpu["exchanged_bytes"]
    if how["mesh"] == "data=4":  # the trained gradients, as narrow as they come, and a few numbers
        assert 0 <= sum(exchanged.values()) - 2 * on_tpu["trainable"] < 256
    if "fsdp=4" in how["mesh"]:  # whole kernels, forward and backward, from every turn of a loop
        assert exchanged["all-gather"] >= 2 * 2 * LINEAR


def test_long_rows_have_a_kernel_on_every_chip_of_a_mesh(tmp_path: Path):
    how = {"method": "lora", "tpu": "v5e:2x2", "mesh": "fsdp=2,tensor=2", **SCANNED}
    long = replace(given(tmp_path, **how), max_length=512)
    made = splash_attention._kernel
    with mock.patch.object(splash_attention, "_kernel", side_effect=made) as kernel:
        by_kernel = plan_step(long)
    assert {call.args[:2] for call in kernel.call_args_list} == {(512, 2)}  # half of the heads
    with hardware.without_kernels():
        assert plan_step(long)["gflop"] == by_kernel["gflop"]


def test_the_kernel_has_no_weights_of_all_pairs_in_memory():
    chip = absent.slice_of("v5e:2x2", "")[0]
    of = jax.ShapeDtypeStruct((4, 2048, 8, 64), jnp.bfloat16, sharding=SingleDeviceSharding(chip))
    with hardware.compiling_for(chip), absent.uncached():
        both = jax.grad(lambda *given: attend(*given).astype(jnp.float32).sum(), (0, 1, 2))
        program: Any = jax.jit(both).lower(of, of, of).compile()
    assert program.as_text().count("tpu_custom_call") >= 3
    assert program.memory_analysis().temp_size_in_bytes < 4 * 8 * 2048**2


def test_without_a_mesh_it_is_one_chip_and_a_base_may_be_quantised(tmp_path: Path):
    how = {"dtype": "bfloat16", "remat": "full", "scan_layers": True, "quantize": "int8"}
    plan = plan_step(given(tmp_path, method="lora", tpu="v5e:2x2", **how))
    assert plan["devices"] == 1
    rest = 2 * (2 * VOCAB * WIDTH + (2 * LAYERS + 1) * WIDTH)
    assert LINEAR + rest < plan["bytes_per_device"]["params"] < 1.1 * (LINEAR + rest)


def test_what_does_not_fit_is_said_in_a_line(capsys: pytest.CaptureFixture[str]):
    model = Path(__file__).parents[1] / "experiments/configs/llama-3-8b"
    words = ["--dtype", "bfloat16", "--remat", "full", "--scan-layers", "--method", "lora"]
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--model", str(model), "--tpu", "v5e:2x2", *words])
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert re.search("not enough memory .*15.75G", said[-1])


def test_a_mesh_is_of_one_chip_or_of_all(tmp_path: Path):
    for mesh, chips in {"": 1, "data=1": 1, "data=-1": 16}.items():
        assert len(absent.slice_of("v5e:4x4", mesh)) == chips
    for mesh in ("fsdp=4", "fsdp=3", "data=32"):
        with pytest.raises(UserError, match=f"mesh '{mesh}' does not fit .* 16:"):
            plan_step(given(tmp_path, tpu="v5e:4x4", mesh=mesh))


def test_a_topology_that_is_none_and_a_missing_compiler_are_errors():
    for topology in ("v5e:3x3", "h200"):
        with pytest.raises(UserError, match=rf"TPU '{topology}': .*such as v5e:2x2"):
            absent.slice_of(topology, "")
    with (
        mock.patch.object(absent, "find_spec", return_value=None),
        pytest.raises(UserError, match="pip install libtpu"),
    ):
        absent.slice_of("v5e:2x2", "")
