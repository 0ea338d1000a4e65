"""Runs with ``--scan-layers``: their adapters are for a stacked base, and all commands know it."""

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from lora_mini_jax import peft
from lora_mini_jax.adapters.transform import merge
from lora_mini_jax.commands.adapters import run_export, run_generate, run_merge
from lora_mini_jax.commands.predict import run_predict
from lora_mini_jax.models import load
from lora_mini_jax.options import Export, Generate, Merge, Predict
from lora_mini_jax.runs.finetune import finetune
from lora_mini_jax.saved import storage
from lora_mini_jax.tasks.sites import all_targets
from tests import encoder_runs, runs, seq2seq_runs
from tests.runs import write_model

QUIET: Any = {"say": lambda line: None}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    """A folder with a Llama of two layers, data, and a run on them."""
    place = tmp_path_factory.mktemp("decoder")
    write_model(place / "model", num_hidden_layers=2)
    settings = ("rank=2", "a=8", "b=8", "outer_init=svd")
    more: dict[str, Any] = {"scan_layers": True, "dtype": "bfloat16", "learning_rate": 0.1}
    finetune(runs.options(place, settings=settings, **more), **QUIET)
    return place


def same(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def commands(place: Path, model: str, prompt: str) -> None:
    """An adapter's text is that of the model it was merged into, which is not stacked; both in
    float32, which the merged model is written in."""
    adapter, merged = str(place / "run" / "adapter"), str(place / "merged")
    assert all(site.target.stack for site in storage.record_of(adapter).sites)
    run_merge(Merge(adapter=adapter, model=str(place / model), output_dir=merged), **QUIET)
    given: Any = {"prompt": (prompt,), "max_new_tokens": 4}
    own: Any = {"model": str(place / model), "adapter": adapter, "dtype": "float32"}
    adapted = run_generate(Generate(**own, **given), **QUIET)
    assert adapted == run_generate(Generate(model=merged, **given), **QUIET)


def test_a_decoder_s_adapter_merges_generates_and_goes_to_peft(decoder):
    commands(decoder, "model", "say red 0")
    base, params = load(decoder / "model", param_dtype=jnp.bfloat16)  # as it was trained on
    _, merged = load(decoder / "merged")
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), merged, params)
    assert moved["layers_0"]["mlp"]["up_proj"]["kernel"] > 1e-3
    assert moved["layers_1"]["mlp"]["up_proj"]["kernel"] > 1e-3

    where: Any = {"adapter": str(decoder / "run" / "adapter"), "output_dir": str(decoder / "peft")}
    run_export(Export(model=str(decoder / "model"), **where), **QUIET)
    names = peft.names_of(base)
    again = peft.load(decoder / "peft", params, all_targets(base)[0], names=names)
    same(merge(params, again, jnp.float32), merged)


def test_its_factors_are_stored_as_without_scan(decoder):
    tensors = load_file(decoder / "run" / "adapter" / "adapter.safetensors")
    assert tensors["trainable/layers/mlp/up_proj/kernel/A"].shape == (2, 8, 2)


def test_in_bfloat16_what_is_trained_and_the_optimiser_stay_float32(decoder):
    newest = max((decoder / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    saved = jax.tree.leaves(ocp.StandardCheckpointer().metadata(newest / "default").item_metadata)
    kinds = Counter(str(leaf.dtype) for leaf in saved if hasattr(leaf, "dtype"))
    names = load_file(decoder / "run" / "adapter" / "adapter.safetensors")
    trained = sum(name.startswith("trainable/") for name in names)
    assert kinds["float32"] >= 3 * trained  # with Adam's two moments
    assert kinds["bfloat16"] == 0


def test_a_t5_s_adapter_merges_and_answers(tmp_path):
    finetune(seq2seq_runs.options(tmp_path, scan_layers=True, max_steps=6), **QUIET)
    commands(tmp_path, "t5", "say red")


def test_an_encoder_s_adapter_predicts(tmp_path):
    options = encoder_runs.options(tmp_path, scan_layers=True, epochs=2.0)
    summary = finetune(options, **QUIET)
    data = str(tmp_path / "valid.jsonl")
    where: Any = {
        "adapter": str(tmp_path / "run" / "adapter"),
        "output": str(tmp_path / "told.jsonl"),
    }
    told = run_predict(Predict(data=data, **where), **QUIET)
    right = [line["label"] == row["label"] for line, row
             in zip(told, encoder_runs.rows(61)[50:], strict=True)]  # fmt: skip
    assert np.mean(right) == pytest.approx(summary["valid_accuracy_after"])
