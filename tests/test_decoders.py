"""Llama's relatives equal transformers' torch models: logits, generated text, saved folders."""

import json
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_mini_jax.errors import UserError
from lora_mini_jax.generation.generate import generate
from lora_mini_jax.models import Llama, LlamaConfig, load, save
from lora_mini_jax.models.attention import init_cache
from lora_mini_jax.models.hub import load_config

BASE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 7, "head_dim": 12, "num_key_value_heads": 1},
    "Qwen2": {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 6,
              "max_window_layers": 1, "tie_word_embeddings": True, "rope_scaling": YARN},
    "Qwen3": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 12,
              "attention_bias": True, "rope_scaling": LINEAR, "rope_theta": 1e6},
    "Gemma": {"head_dim": 10, "num_key_value_heads": 1, "hidden_act": "gelu"},
    "Gemma2": {"head_dim": 10, "num_key_value_heads": 2, "query_pre_attn_scalar": 7,
               "sliding_window": 5, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0, "attn_implementation": "eager"},
    "Gemma3": {"head_dim": 10, "num_key_value_heads": 2, "query_pre_attn_scalar": 7,
               "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"],
               "rope_scaling": LINEAR, "rope_theta": 1e5, "rope_local_base_freq": 1e3,
               "final_logit_softcapping": 3.0, "tie_word_embeddings": False},
}  # fmt: skip
PROMPTS = [[5], [7, 9, 11, 4, 33], [8] * 3 + [21, 22, 23] * 4]


@pytest.fixture(scope="module", params=CASES)
def oracle(request, tmp_path_factory):
    """(folder, torch model) of a random model in which every number matters."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name = request.param
    of = transformers.Gemma3TextConfig if name == "Gemma3" else getattr(
        transformers, f"{name}Config")  # fmt: skip
    torch.manual_seed(0)
    hf = getattr(transformers, f"{name}ForCausalLM")(of(**BASE | CASES[name]))
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.1))
    folder = tmp_path_factory.mktemp(name)
    hf.save_pretrained(folder)
    return folder, hf.eval()


def tokens_of(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(3, 61, shape), jnp.int32)


def run(model, params, *args, **kwargs):
    return jax.jit(model.apply)({"params": params}, *args, **kwargs)


def torch_logits(hf, tokens, mask=None):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(np.asarray(mask))
        return hf(torch.tensor(np.asarray(tokens)), attention_mask=mask).logits.numpy()


def test_logits_equal_transformers(oracle):
    folder, hf = oracle
    tokens, valid = tokens_of((2, 20)), jnp.array([[1] * 20, [1] * 15 + [0] * 5])
    got = run(*load(folder), tokens)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, torch_logits(hf, tokens), rtol=1e-4, atol=2e-5)
    got = run(*load(folder, scan_layers=True, remat="full"), tokens, None, valid)
    want, seen = torch_logits(hf, tokens, valid), np.asarray(valid, bool)
    np.testing.assert_allclose(np.asarray(got)[seen], want[seen], rtol=1e-4, atol=2e-5)


def test_greedy_text_equals_transformers(oracle):
    torch = pytest.importorskip("torch")
    folder, hf = oracle
    width = max(map(len, PROMPTS))
    left = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    out = hf.generate(left, attention_mask=(left > 0).long(), max_new_tokens=12, do_sample=False)
    wanted = []
    for row in out[:, width:].tolist():
        wanted.append(row[: row.index(2)] if 2 in row else row)
    assert generate(*load(folder), PROMPTS, max_new_tokens=12) == wanted
    assert len({t for row in wanted for t in row}) > 3  # not a constant


def test_a_saved_model_is_the_same_in_transformers(oracle, tmp_path):
    auto = pytest.importorskip("transformers").AutoModelForCausalLM
    folder, hf = oracle
    save(tmp_path / "saved", *load(folder, scan_layers=True))
    again = auto.from_pretrained(
        tmp_path / "saved", attn_implementation=hf.config._attn_implementation
    )
    assert type(again) is type(hf)
    tokens = tokens_of((1, 20))
    np.testing.assert_array_equal(torch_logits(again.eval(), tokens), torch_logits(hf, tokens))
    assert load_config(tmp_path / "saved") == load_config(folder)
    # Without what only transformers 4 reads, as transformers 5 would write it.
    hf5 = json.loads((tmp_path / "saved/config.json").read_text())
    for name in ("rope_theta", "rope_scaling", "rope_local_base_freq"):
        hf5.pop(name, None)
    assert LlamaConfig.from_hf(hf5) == load_config(folder)


@cache
def random(name):
    """(model, params) of a case, with random weights."""
    extra = {k: v for k, v in CASES[name].items()
             if k not in ("attn_implementation", "use_sliding_window", "max_window_layers",
                          "rope_scaling", "layer_types")}  # fmt: skip
    model = Llama(LlamaConfig(**BASE | extra, architecture=f"{name}ForCausalLM"))
    rng, shapes = np.random.default_rng(1), jax.eval_shape(model.init, jax.random.key(0), PROBE)
    draw = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(s.dtype), shapes["params"])
    return model, jax.tree.map(jnp.asarray, draw)


PROBE = jnp.ones((1, 2), jnp.int32)


def test_windows_in_packed_segments_and_in_the_cache():
    model, params = random("Gemma2")  # a layer with a window and one without
    tokens = tokens_of((2, 12))
    alone = run(model, params, tokens)
    packed = jnp.concatenate([tokens[:1], jnp.zeros((1, 2), jnp.int32), tokens[1:]], axis=1)
    segments = jnp.array([[1] * 12 + [0] * 2 + [2] * 12])
    got = run(model, params, packed, None, segments)
    np.testing.assert_allclose(got[0, :12], alone[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[0, 14:], alone[1], rtol=1e-4, atol=1e-5)
    kept, parts, call = init_cache(model.config, 2, 16), [], jax.jit(model.apply)
    for cut in (slice(0, 6), slice(6, 12)):
        out, kept = call({"params": params}, tokens[:, cut], cache=kept)
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Mistral", "Gemma3"])
def test_a_window_hides_what_is_before_it(name):
    """Through two layers a token is seen over at most two windows, less what both count."""
    model, params = random(name)
    if name == "Gemma3":
        config = model.config
        every = ("sliding_attention",) * config.num_hidden_layers
        model = model.clone(config=LlamaConfig(**vars(config) | {"layer_types": every}))
    window = model.config.sliding_window
    tokens = tokens_of((1, 20))
    call = jax.jit(model.apply)
    before = call({"params": params}, tokens)
    after = call({"params": params}, tokens.at[0, 0].set(60))
    changed = np.abs(np.asarray(after - before)[0]).max(axis=-1) > 0
    assert changed[: 2 * window - 1].all()
    assert not changed[2 * window - 1 :].any()


HF: dict[str, Any] = {k: v for k, v in BASE.items() if not k.endswith(("_id", "embeddings"))}


def read(name, **changes):
    given = HF | {"architectures": [f"{name}ForCausalLM"], "num_key_value_heads": 4}
    return LlamaConfig.from_hf(given | changes)


def test_what_a_file_does_not_say_is_as_in_transformers():
    transformers = pytest.importorskip("transformers")
    for name in CASES:
        of = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
        sizes = HF | {"hidden_size": 64, "num_attention_heads": 32, "num_hidden_layers": 7}
        hf = getattr(transformers, of)(**sizes)
        got = LlamaConfig.from_hf(sizes | {"architectures": [f"{name}ForCausalLM"]})
        same = ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "rope_theta",
                "max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id",
                "pad_token_id", *got.kind.options)  # fmt: skip
        if not hasattr(hf, "rope_theta"):  # transformers 5
            ropes = hf.rope_parameters
            hf.rope_theta = ropes.get("full_attention", ropes)["rope_theta"]
            if "sliding_attention" in ropes:
                hf.rope_local_base_freq = ropes["sliding_attention"]["rope_theta"]
        for key in dict.fromkeys(same):
            if key != "layer_types":
                assert getattr(got, key) == getattr(hf, key), (name, key)
        if (width := getattr(hf, "head_dim", None)) is not None:
            assert got.head_dim == width
        assert got.hidden_act == getattr(hf, got.kind.activation)
        if "layer_types" in got.kind.options:
            types = [("full_attention", "sliding_attention")[slides] for slides in got.sliding]
            assert types == hf.layer_types


def test_the_rules_of_older_files():
    both = read("Gemma3", num_hidden_layers=6, sliding_window_pattern=3)
    assert both.sliding == (True, True, False) * 2
    assert read("Gemma3", num_hidden_layers=6, sliding_window_pattern=6).layer_types == ()
    late = {"num_hidden_layers": 3, "max_window_layers": 2, "sliding_window": 4}
    assert read("Qwen2", **late, use_sliding_window=True).sliding == (False, False, True)
    assert read("Qwen2", **late).sliding == (False,) * 3
    assert read("Gemma2", sliding_window_pattern=1).sliding == (True, False)  # only Gemma 3's key
    assert read("Mistral", sliding_window=None).sliding == (False, False)
    assert read("Qwen3", model_type="qwen3", architectures=None, head_dim=None,
                num_key_value_heads=None).head_dim == 8  # fmt: skip


NO_DECODER: Any = nn.Dense(3)
REFUSED = {
    "a field of another": (lambda: LlamaConfig(**BASE, sliding_window=4),
                           ["sliding_window=4", "LlamaForCausalLM"]),
    "an architecture": (lambda: LlamaConfig(**BASE, architecture="Mamba"), ["'Mamba'", "Gemma3"]),
    "model type": (lambda: read("Llama", model_type="mistral"), ["'mistral'", "'llama'"]),
    "a cap": (lambda: read("Gemma3", attn_logit_softcapping=5.0), ["attn_logit_softcapping 5.0"]),
    **{f"both ways {name}": (lambda n=name: read(n, use_bidirectional_attention=True),
                             ["use_bidirectional_attention True"])
       for name in ("Gemma", "Gemma2", "Gemma3")},
    "not causal": (lambda: read("Mistral", is_causal=False), ["is_causal False"]),
    "two kinds": (lambda: read("Qwen2", rope_scaling={"type": "linear", "rope_type": "yarn"}),
                  ["rope_type 'yarn' contradicts type 'linear'"]),
    "layers": (lambda: read("Gemma2", layer_types=["full_attention"]), ["1 entries"]),
    "kinds": (lambda: read("Gemma2", layer_types=["chunked_attention"] * 2), ["chunked"]),
    "no window": (lambda: read("Qwen2", layer_types=["sliding_attention"] * 2),
                  ["no sliding_window"]),
    "dynamic": (lambda: read("Qwen2", rope_scaling={"type": "dynamic", "factor": 2.0}),
                ["'dynamic'", "'linear', 'llama3', 'yarn'"]),
    "yarn": (lambda: read("Qwen2", rope_scaling={"type": "yarn"}), ["yarn rope", "factor"]),
    "local stretch": (lambda: read("Gemma3", rope_parameters={
        "full_attention": {}, "sliding_attention": LINEAR}), ["'linear' of sliding layers"]),
    "a flag": (lambda: read("Qwen3", attention_bias="yes"), ["attention_bias='yes'"]),
    "ids": (lambda: read("Qwen3", eos_token_id=[1, "x"]), ["eos_token_id=(1, 'x')"]),
    "an encoder": (lambda: generate(NO_DECODER, {}, [[1]]), ["with a Dense", "Llama"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda name: name.replace(" ", "-"))
def test_what_is_not_supported_is_said(case):
    give, words = REFUSED[case]
    with pytest.raises(UserError) as error:
        give()
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)
