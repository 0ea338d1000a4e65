"""Generated text equals transformers' greedy text, and sampling keeps its promises."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_mini_jax.errors import UserError
from lora_mini_jax.generation.generate import generate
from lora_mini_jax.generation.sampling import pick, sampling
from lora_mini_jax.models import Llama, LlamaConfig, load, save

SHARED = Path(os.environ.get("LMJ_SHARED", Path(__file__).parents[1] / "../shared"))
PROMPTS = [[5], [7, 9, 11, 4, 33], [8] * 3 + [21, 22, 23] * 4]
SHAPE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def small():
    """(model, params) with random weights large enough for varied text."""
    model, rng = Llama(LlamaConfig(**SHAPE)), np.random.default_rng(3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    draw = jax.tree.map(lambda s: rng.normal(s.ndim == 1, 0.5, s.shape).astype(s.dtype), shapes)
    return model, jax.tree.map(jnp.asarray, draw)


def test_greedy_equals_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(1)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    hf.save_pretrained(tmp_path)
    wanted = []
    for prompt in PROMPTS:
        out = hf.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False,
                          attention_mask=torch.ones(1, len(prompt)), pad_token_id=0)  # fmt: skip
        wanted.append([t for t in out[0, len(prompt) :].tolist() if t != 2])
    for scan in (False, True):
        assert generate(*load(tmp_path, scan_layers=scan), PROMPTS, max_new_tokens=20) == wanted
    assert len({t for row in wanted for t in row}) > 10  # not a constant


@pytest.mark.parametrize("name", ["stories260K", "babyllama105"])
def test_golden_of_pretrained_models(name):
    folder = SHARED / "models"
    if not folder.is_dir():
        pytest.skip(f"pretrained models are not at {folder}: set LMJ_SHARED")
    golden = json.loads((folder / "golden.json").read_text())[name]
    texts = generate(*load(folder / f"{name}-hf"), [golden["ids"], [1]], max_new_tokens=16)
    assert texts[0] == golden["greedy_next16"]


def test_a_row_stops_at_its_end_token_and_the_others_go_on(small):
    free = generate(*small, PROMPTS, max_new_tokens=8, eos_id=())
    assert [len(row) for row in free] == [8] * 3
    end = free[1][4]
    for eos in (end, [end]):
        got = generate(*small, PROMPTS, max_new_tokens=8, eos_id=eos)
        cut = [row.index(end) if end in row else 8 for row in free]
        assert got == [row[:n] for row, n in zip(free, cut, strict=True)]
        assert len(got[1]) <= 4


def test_the_end_token_is_the_configs_by_default(small):
    model, params = small
    first = generate(model, params, PROMPTS, max_new_tokens=8, eos_id=())[2][0]
    config = LlamaConfig(**SHAPE, eos_token_id=(first, 60))
    assert generate(Llama(config), params, PROMPTS, max_new_tokens=8)[2] == []


def test_the_end_tokens_of_a_folder_are_those_of_its_generation_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    hf.generation_config.eos_token_id = [2, 60]
    hf.save_pretrained(tmp_path / "chat")
    model, params = load(tmp_path / "chat")
    assert model.config.eos_token_id == (2, 60)
    save(tmp_path / "again", model, params)  # which writes no such file
    assert load(tmp_path / "again")[0] == model
    for wrong in ("two", [2, -1], [[2]]):
        text = json.dumps({"eos_token_id": wrong})
        (tmp_path / "chat/generation_config.json").write_text(text)
        with pytest.raises(UserError, match="is no token id; correct it"):
            load(tmp_path / "chat")


def test_a_row_does_not_depend_on_its_neighbours(small):
    together = generate(*small, PROMPTS, max_new_tokens=8)
    for i, prompt in enumerate(PROMPTS):
        assert generate(*small, [prompt, [9], [60] * 3], max_new_tokens=8)[0] == together[i]
    # A long neighbour puts the row in another bucket, with other padding.
    assert generate(*small, [*PROMPTS[:2], [9] * 40], max_new_tokens=8)[:2] == together[:2]


def test_one_program_for_all_settings(small, monkeypatch):
    model, params = small
    module, traces = sys.modules["lora_mini_jax.generation.decoder"], []
    count = module.init_cache  # called once a trace
    monkeypatch.setattr(module, "init_cache", lambda *args: (traces.append(args), count(*args))[1])
    for temperature, top_p, seed in [(0.0, 1.0, 0), (0.7, 0.9, 1), (2, 0.5, 2)]:
        prompts = [[5 + seed] * (1 + 4 * seed)]
        generate(model, params, prompts, max_new_tokens=5, temperature=temperature, top_p=top_p,
                 seed=seed)  # fmt: skip
    # An equal model is the same program, too.
    generate(Llama(LlamaConfig(**SHAPE)), params, [[5, 6]], max_new_tokens=5)
    assert len(traces) == 1


def test_same_seed_same_text(small):
    kw: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.5, "eos_id": ()}
    first = generate(*small, PROMPTS, seed=4, **kw)
    assert generate(*small, PROMPTS, seed=4, **kw) == first
    assert generate(*small, PROMPTS, seed=5, **kw) != first
    twins = generate(*small, [[5, 6]] * 3, seed=4, **kw)
    assert twins[0] != twins[1]


def picks(logits, temperature, top_p, count=4000):
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1))
    return np.asarray(jax.jit(pick)(rows, sampling(temperature, top_p, 0)))


PROBS = np.array([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [(0.39, {1}), (0.41, {1, 3}), (0.75, {1, 3, 4}), (0.9, {0, 1, 3, 4}), (1.0, {0, 1, 2, 3, 4})],
)
def test_sampling_stays_in_the_nucleus_with_its_probabilities(top_p, nucleus):
    counts = np.bincount(picks(np.log(PROBS), 1.0, top_p), minlength=5) / 4000
    assert set(np.flatnonzero(counts)) == nucleus
    kept = np.where([i in nucleus for i in range(5)], PROBS, 0)
    np.testing.assert_allclose(counts, kept / kept.sum(), atol=0.04)


def test_temperature_sharpens_and_flattens():
    sharp = np.bincount(picks(np.log(PROBS), 0.5, 1.0), minlength=5) / 4000
    np.testing.assert_allclose(sharp, PROBS**2 / np.sum(PROBS**2), atol=0.04)
    for tiny in (1e-30, 0.0):
        assert set(picks(np.log(PROBS) * 100, tiny, 1.0)) == {1}


def test_nucleus_of_one_is_greedy_text(small):
    greedy = generate(*small, PROMPTS, max_new_tokens=8)
    assert generate(*small, PROMPTS, max_new_tokens=8, temperature=3.0, top_p=1e-6) == greedy


def test_an_adapted_model_writes_what_the_merged_one_does(small):
    from lora_mini_jax import init, merge
    from lora_mini_jax.linen import targets
    from lora_mini_jax.methods.lora import LoRA

    model, params = small
    adapter = init(params, LoRA(rank=2), targets(model, params, jnp.ones((1, 4), jnp.int32)))
    plain = generate(model, params, PROMPTS, max_new_tokens=8)
    assert generate(model, params, PROMPTS, adapter=adapter, max_new_tokens=8) == plain
    moved = adapter.with_trainable(jax.tree.map(lambda x: x + 0.3, adapter.trainable))
    got = generate(model, params, PROMPTS, adapter=moved, max_new_tokens=8)
    assert got == generate(model, merge(params, moved), PROMPTS, max_new_tokens=8)
    assert got != plain


def test_no_prompts_no_texts(small):
    assert generate(*small, []) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([[5], []], {}, ["prompt 1 is empty"]),
        ([[5, 61, -1]], {}, ["prompt 0 has ids [61, -1] outside 0..60"]),
        (["text"], {}, ["prompt 0 is not a list of token ids"]),
        ([[1.5]], {}, ["prompt 0 is not a list of token ids"]),
        ([[5] * 50], {"max_new_tokens": 16}, ["50 prompt tokens", "the model's 64"]),
        ([[5]], {"max_new_tokens": 0}, ["max_new_tokens=0"]),
        ([[5]], {"temperature": -0.1}, ["temperature=-0.1"]),
        ([[5]], {"temperature": float("nan")}, ["temperature=nan"]),
        ([[5]], {"top_p": 0.0}, ["top_p=0.0"]),
        ([[5]], {"top_p": 1.1, "temperature": -1}, ["top_p=1.1", "temperature=-1"]),
    ],
)
def test_a_mistake_is_one_clear_line(small, prompts, settings, words):
    with pytest.raises(UserError) as error:
        generate(*small, prompts, **{"max_new_tokens": 8} | settings)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_last_position_may_be_used(small):
    assert len(generate(*small, [[5] * 57] * 3, max_new_tokens=8, eos_id=())[0]) == 8
