"""What was trained on a mesh or in bfloat16 is continued, told, merged and exported so too."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from lora_mini_jax import UserError, linen, merge, sharding
from lora_mini_jax.commands.adapters import run_export, run_generate, run_merge
from lora_mini_jax.commands.predict import run_predict
from lora_mini_jax.models import load
from lora_mini_jax.options import Export, Generate, Merge, Predict
from lora_mini_jax.runs.finetune import finetune
from lora_mini_jax.tasks.devices import Devices
from lora_mini_jax.tasks.trained import Trained
from lora_mini_jax.tree import flatten
from tests import encoder_runs, runs, seq2seq_runs

QUIET: Any = {"say": lambda line: None}
MESH = "data=2,fsdp=2,tensor=2"
BFLOAT16 = jnp.dtype("bfloat16")
ASKED: Any = {"prompt": ("say red 0", "say blue"), "max_new_tokens": 6}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A Llama, and adapters trained on it in either kind of numbers."""
    place = tmp_path_factory.mktemp("decoder")
    settings = ("rank=2", "a=8", "b=8", "outer_init=svd")
    more: dict[str, Any] = {"learning_rate": 0.1, "samples": 0, "settings": settings}
    finetune(runs.options(place, output_dir=str(place / "float32"), **more), **QUIET)
    more |= {"dtype": "bfloat16", "mesh": MESH}
    finetune(runs.options(place, output_dir=str(place / "bfloat16"), **more), **QUIET)
    return place


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Path:
    """An encoder, and a classifier trained on it in bfloat16."""
    place = tmp_path_factory.mktemp("encoder")
    options = encoder_runs.options(place, dtype="bfloat16", epochs=3.0)
    (place / "summary.json").write_text(json.dumps(finetune(options, **QUIET)))
    return place


def adapter(place: Path, name: str) -> str:
    return str(place / name / "adapter")


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_base_and_adapter_go_where_training_has_them_in_its_numbers(place: Path, name: str):
    devices = Devices.on(MESH)
    trained = Trained.read(adapter(place, name))
    model, params, found = trained.load(devices=devices)
    assert model.dtype == model.param_dtype == name
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {name}
    assert params["layers_0"]["mlp"]["up_proj"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert params["lm_head"]["kernel"].sharding.spec[0] == "fsdp"
    mesh = devices.mesh
    assert mesh is not None
    places = sharding.of_adapter(mesh, found)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == places
    one = trained.load()[2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-2), found, one)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_mesh_writes_the_same_text(place: Path, name: str):
    """In float32: on a mesh sums are rounded elsewhere, and in bfloat16 that tells in a text."""
    given: Any = {"adapter": adapter(place, name), "dtype": "float32", **ASKED}
    alone = run_generate(Generate(**given), **QUIET)
    assert any(alone)
    assert run_generate(Generate(mesh="fsdp=4,tensor=2", **given), **QUIET) == alone


def test_in_bfloat16_a_mesh_computes_the_same_but_for_rounding(place: Path):
    tokens, found = jnp.arange(24).reshape(2, 12) + 3, []
    for mesh in ("", MESH):
        model, *given = Trained.read(adapter(place, "bfloat16")).load(devices=Devices.on(mesh))
        found.append(jax.jit(linen.adapt(model))(*given, tokens))
    alone, meshed = found
    np.testing.assert_allclose(meshed, alone, atol=0.02)
    assert float(jnp.std(alone)) > 0.1


def test_a_plain_model_is_read_onto_a_mesh_too(place: Path, monkeypatch: pytest.MonkeyPatch):
    from lora_mini_jax.commands import adapters

    seen = []

    def generate(model: Any, params: Any, prompts: Any, **how: Any) -> Any:
        seen.append((model.dtype, params["layers_0"]["mlp"]["up_proj"]["kernel"]))
        return [[5]] * len(prompts)

    monkeypatch.setattr(adapters, "generate", generate)
    model = str(place / "model")
    run_generate(Generate(model=model, **ASKED), **QUIET)
    run_generate(Generate(model=model, dtype="bfloat16", mesh=MESH, **ASKED), **QUIET)
    (dtype, plain), (narrow, split) = seen
    assert (dtype, plain.dtype) == (jnp.float32, jnp.float32)
    assert (narrow, split.dtype) == (BFLOAT16, BFLOAT16)
    assert len(plain.devices()) == 1
    assert split.addressable_shards[0].data.size == split.size // 4


def test_a_t5_answers_on_a_mesh(tmp_path: Path):
    finetune(seq2seq_runs.options(tmp_path, max_steps=20, samples=0), **QUIET)
    given: Any = {"adapter": adapter(tmp_path, "run"), "prompt": ("say red", "say say gold")}
    alone = run_generate(Generate(**given), **QUIET)
    assert run_generate(Generate(mesh=MESH, **given), **QUIET) == alone
    assert any(alone)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_mesh_merges_and_exports_the_same(place: Path, name: str, tmp_path: Path):
    both: Any = ((run_merge, Merge, "model.safetensors"),
                 (run_export, Export, "adapter_model.safetensors"))  # fmt: skip
    for command, options, file in both:
        for mesh in ("", MESH):
            out = str(tmp_path / f"{options.__name__}{mesh}")
            command(options(adapter=adapter(place, name), output_dir=out, mesh=mesh), **QUIET)
        alone, meshed = (load_file(tmp_path / f"{options.__name__}{m}" / file) for m in ("", MESH))
        assert alone.keys() == meshed.keys()
        for tensor, value in alone.items():
            np.testing.assert_allclose(meshed[tensor], value, atol=2e-6, err_msg=tensor)


def test_merged_kernels_stay_split(place: Path):
    _, params, found = Trained.read(adapter(place, "bfloat16")).load(devices=Devices.on(MESH))
    merged = flatten(merge(params, found, jnp.float32))
    for site in found.sites:
        kernel = merged[site.target.path]
        assert kernel.dtype == jnp.float32
        assert kernel.addressable_shards[0].data.size < kernel.size, site.target.path


def test_a_float32_file_keeps_what_a_bfloat16_kernel_would_lose(place: Path, tmp_path: Path):
    given: Any = {"adapter": adapter(place, "bfloat16")}
    for dtype in ("float32", "bfloat16"):
        run_merge(Merge(output_dir=str(tmp_path / dtype), dtype=dtype, **given), **QUIET)
    _, base, found = Trained.read(given["adapter"]).load()
    exact = flatten(merge(base, found, jnp.float32))
    wide, narrow = (flatten(load(tmp_path / d, param_dtype=d)[1]) for d in ("float32", "bfloat16"))
    lost = 0
    for path, leaf in exact.items():
        np.testing.assert_array_equal(wide[path], leaf.astype(jnp.float32))
        np.testing.assert_array_equal(narrow[path], leaf.astype(BFLOAT16))
        lost += int(np.sum(wide[path] != narrow[path].astype(jnp.float32)))
    assert lost > 1000
    whole = json.loads((tmp_path / "bfloat16" / "config.json").read_text())
    assert whole["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_head_that_was_drawn_in_bfloat16_is_found_again(told: Path, dtype: Any, tmp_path: Path):
    given: Any = {"adapter": adapter(told, "run"), "data": str(told / "valid.jsonl")}
    alone = run_predict(Predict(output=str(tmp_path / "a"), dtype=dtype, **given), **QUIET)
    truth = encoder_runs.rows(61)[50:]
    right = [line["label"] == row["label"] for line, row in zip(alone, truth, strict=True)]
    summary = json.loads((told / "summary.json").read_text())
    assert np.mean(right) == pytest.approx(summary["valid_accuracy_after"])
    meshed = run_predict(
        Predict(output=str(tmp_path / "b"), dtype=dtype, mesh=MESH, batch_size=4, **given), **QUIET
    )
    for ours, theirs in zip(meshed, alone, strict=True):
        assert ours["index"] == theirs["index"]
        near = 1e-5 if dtype else 2e-2
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=near)


def test_factors_from_kernels_want_the_numbers_of_training(place: Path):
    with pytest.raises(UserError, match="as precise as it was in training"):
        run_generate(
            Generate(adapter=adapter(place, "float32"), dtype="bfloat16", **ASKED), **QUIET
        )


COMMANDS: dict[str, Any] = {
    "generate": (run_generate, Generate, ASKED),
    "predict": (run_predict, Predict, {"data": "no", "output": "no"}),
    "merge": (run_merge, Merge, {"output_dir": "no"}),
    "export": (run_export, Export, {"output_dir": "no"}),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mesh_that_is_none_is_refused_before_anything_is_read(name: str):
    command, options, more = COMMANDS[name]
    with pytest.raises(UserError, match=r"mesh 'data=3' does not fit"):
        command(options(adapter="nowhere", mesh="data=3", **more), **QUIET)


def test_rows_that_a_mesh_cannot_split_are_refused_before_anything_is_read():
    given: Any = {"adapter": "nowhere", "data": "no", "output": "no", "mesh": MESH}
    with pytest.raises(UserError, match="a batch of 6 rows cannot be split"):
        run_predict(Predict(batch_size=6, **given), **QUIET)
