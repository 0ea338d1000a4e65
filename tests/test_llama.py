"""The Llama equals transformers' torch model, in every variant, and its folders are read safely."""

import json
import os
import shutil
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_mini_jax.errors import UserError
from lora_mini_jax.models import Llama, LlamaConfig, load, save
from lora_mini_jax.models.attention import init_cache
from lora_mini_jax.models.hub import load_config, resolve

SHARED = Path(os.environ.get("LMJ_SHARED", Path(__file__).parents[1] / "../shared"))
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
BASE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "as many kv heads": {},
    "grouped, tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "one kv head, theta": {"num_key_value_heads": 1, "rope_theta": 500000.0},
    "wide heads, biases": {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
    "llama3 rope": {"rope_scaling": LLAMA3, "num_key_value_heads": 2},
}
VARIANTS = [(True, "none"), (False, "full"), (True, "full")]


def run(model, params, *args, **kwargs):
    """One compiled call: eager, each operation would be compiled alone, which is slower."""
    return jax.jit(model.apply)({"params": params}, *args, **kwargs)


def tokens_of(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(3, 61, shape), jnp.int32)


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def oracle(request, tmp_path_factory):
    """(folder, torch model) of a random Llama whose norms and biases are not trivial."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    given = deepcopy(BASE | CASES[request.param])  # transformers writes into it
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**given))
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    folder = tmp_path_factory.mktemp("llama")
    hf.save_pretrained(folder)
    return folder, hf.eval()


def torch_logits(hf, tokens):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return hf(torch.tensor(np.asarray(tokens))).logits.numpy()


@cache
def small(tied=True, bias=False):
    """(model, params, tokens) with a random grouped-query model."""
    model = Llama(LlamaConfig(**BASE, num_key_value_heads=2, initializer_range=0.2,
                              tie_word_embeddings=tied, attention_bias=bias))  # fmt: skip
    tokens, rng = tokens_of((2, 12)), np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    draw = jax.tree.map(lambda s: rng.normal(s.ndim == 1, 0.2, s.shape).astype(s.dtype), shapes)
    return model, jax.tree.map(jnp.asarray, draw), tokens


def stacked(params):
    """The same parameters as ``scan_layers`` wants them."""
    layers = [params[f"layers_{i}"] for i in range(2)]
    rest = {k: v for k, v in params.items() if not k.startswith("layers")}
    return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def test_logits_equal_transformers(oracle):
    folder, hf = oracle
    tokens = tokens_of((2, 40))
    model, params = load(folder)
    got = run(model, params, tokens)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, torch_logits(hf, tokens), rtol=1e-4, atol=2e-5)
    scanned, params = load(folder, scan_layers=True, remat="full")
    np.testing.assert_allclose(run(scanned, params, tokens), got, rtol=1e-4, atol=2e-5)


def test_saved_model_equals_in_transformers(oracle, tmp_path):
    auto = pytest.importorskip("transformers").AutoModelForCausalLM
    folder, hf = oracle
    tokens = tokens_of((1, 30))
    for scan in (False, True):
        save(tmp_path / str(scan), *load(folder, scan_layers=scan))
        again = auto.from_pretrained(tmp_path / str(scan)).eval()
        np.testing.assert_array_equal(torch_logits(again, tokens), torch_logits(hf, tokens))
    assert load_config(tmp_path / "True") == load_config(folder)


@partial(jax.jit, static_argnums=0)
def loss_and_grads(model, params, tokens):
    def loss(params):
        return jnp.mean(jnp.sin(model.apply({"params": params}, tokens)))

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize(("scan", "remat"), VARIANTS)
def test_variants_equal_plain_forward_and_gradients(scan, remat):
    model, params, tokens = small()
    variant = model.clone(scan_layers=scan, remat=remat)
    same = stacked(params) if scan else params
    value, grads = loss_and_grads(model, params, tokens)
    value2, grads2 = loss_and_grads(variant, same, tokens)
    np.testing.assert_allclose(value2, value, rtol=1e-5)
    want = stacked(grads) if scan else grads
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads2, want)
    fresh = jax.eval_shape(variant.init, jax.random.key(0), tokens)["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, same)


def test_stacked_layers_are_initialised_apart():
    model, _, tokens = small()
    init = jax.jit(model.clone(scan_layers=True).init)
    layers = init(jax.random.key(0), tokens)["params"]["layers"]
    first, second = layers["mlp"]["up_proj"]["kernel"]
    assert not np.allclose(first, second)
    np.testing.assert_allclose(jnp.std(first), 0.2, rtol=0.1)


def test_names_and_initialiser():
    model, _, tokens = small(tied=False, bias=True)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    assert set(params) == {"embed_tokens", "layers_0", "layers_1", "norm", "lm_head"}
    assert set(params["layers_0"]["self_attn"]["q_proj"]) == {"kernel", "bias"}
    assert params["layers_1"]["mlp"]["down_proj"]["kernel"].shape == (48, 32)
    np.testing.assert_allclose(jnp.std(params["embed_tokens"]["embedding"]), 0.2, rtol=0.1)


@pytest.mark.parametrize("scan", [False, True])
def test_packed_segments_equal_separate_runs(scan):
    model, params, tokens = small()
    model, params = model.clone(scan_layers=scan), stacked(params) if scan else params
    packed = jnp.concatenate([tokens[:1, :5], tokens[1:, :7], jnp.zeros((1, 3), jnp.int32)], axis=1)
    segments = jnp.array([[1] * 5 + [2] * 7 + [0] * 3])
    restarted = jnp.array([[*range(5), *range(7), 0, 0, 0]])
    alone = run(model, params, tokens)
    first, second = alone[:1, :5], alone[1:, :7]  # causal: what follows does not matter
    for positions in (None, restarted):  # rotary positions are relative: both are the same
        got = run(model, params, packed, positions, segments)
        np.testing.assert_allclose(got[:, :5], first, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got[:, 5:12], second, rtol=1e-4, atol=1e-5)


def test_padding_rows_have_finite_logits_and_gradients():
    model, params, tokens = small()
    segments = jnp.array([[0] * 12, [0] * 4 + [1] * 8])

    @jax.jit
    def forward_and_back(params):
        call = partial(model.apply, segment_ids=segments)
        logits, pull = jax.vjp(lambda p: call({"params": p}, tokens), params)
        return logits, pull(jnp.ones_like(logits))

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(forward_and_back(params)))


@pytest.mark.parametrize(("scan", "dtype", "tol"), [(0, "float32", 1e-4), (1, "float32", 1e-4),
                                                    (0, "bfloat16", 0.1)])  # fmt: skip
def test_cached_decoding_equals_the_full_forward(scan, dtype, tol):
    model, params, tokens = small()
    model = model.clone(scan_layers=bool(scan), dtype=jnp.dtype(dtype))
    params = stacked(params) if scan else params
    full = run(model, params, tokens)
    left = jnp.pad(tokens, [(0, 0), (3, 0)])
    segments = jnp.array([[0] * 3 + [1] * 12] * 2)
    positions = jnp.maximum(jnp.arange(15) - 3, 0)[None].repeat(2, 0)
    cache, got = init_cache(model.config, 2, 20, model.dtype), []
    for a, b in [(0, 7), (7, 11), (11, 15)]:
        cut = np.s_[:, a:b]
        out, cache = run(model, params, left[cut], positions[cut], segments[cut], cache)
        got.append(out)
    assert int(cache["length"]) == 15
    got = jnp.concatenate(got, axis=1)[:, 3:]
    np.testing.assert_allclose(got, full, rtol=tol, atol=tol)


def test_cache_defaults_continue_positions():
    model, params, tokens = small()
    cache = init_cache(model.config, 2, 12)
    first, cache = run(model, params, tokens[:, :5], cache=cache)
    second, _ = run(model, params, tokens[:, 5:], cache=cache)
    full = run(model, params, tokens)
    got = jnp.concatenate([first, second], axis=1)
    np.testing.assert_allclose(got, full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["stories260K", "babyllama105"])
def test_golden_of_pretrained_models(name):
    folder = SHARED / "models"
    if not folder.is_dir():
        pytest.skip(f"pretrained models are not at {folder}: set LMJ_SHARED")
    golden = json.loads((folder / "golden.json").read_text())[name]
    model, params = load(folder / f"{name}-hf")
    assert sum(p.size for p in jax.tree.leaves(params)) == golden["cfg"]["n"]
    ids = jnp.array([golden["ids"]])
    logits = run(model, params, ids)[0]
    np.testing.assert_allclose(logits[-1, :8], golden["last_logits_first8"], atol=1e-4)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), ids[0, 1:, None], axis=-1)
    np.testing.assert_allclose(nll.mean(), golden["mean_nll"], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_float_of_a_file_is_read(tmp_path, dtype):
    model, params, _ = small()
    save(tmp_path / "m", model, params, dtype=dtype)
    stored = load_file(tmp_path / "m/model.safetensors")
    assert {v.dtype.name for v in stored.values()} == {dtype}
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == dtype
    rounded = jax.tree.map(lambda p: p.astype(dtype).astype(jnp.float32), params)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "m")[1], rounded)
    kept = load(tmp_path / "m", param_dtype=jnp.bfloat16, scan_layers=True)[1]
    assert {p.dtype for p in jax.tree.leaves(kept)} == {jnp.dtype("bfloat16")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model, to be copied."""
    model, params, _ = small()
    path = tmp_path_factory.mktemp("saved") / "model"
    save(path, model, params)
    return path


@pytest.fixture
def folder(tmp_path, saved):
    """A saved model of the test's own; ``tensors`` rewrites its weights."""
    return shutil.copytree(saved, tmp_path / "model")


def tensors(folder, **changes):
    """Rewrite the weights: a name with ``__`` for dots; None removes it."""
    now = load_file(folder / "model.safetensors")
    now = {**now, **{k.replace("__", "."): v for k, v in changes.items()}}
    save_file({k: v for k, v in now.items() if v is not None}, folder / "model.safetensors")


def shard(folder, **names):
    """Split the weights over two files, with an index; ``names`` replaces a shard's name in it."""
    now = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {}
    for i, part in enumerate((list(now)[::2], list(now)[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({k: now[k] for k in part}, folder / file)
        where |= dict.fromkeys(part, names.get("second", file) if i else file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_shards_are_read(folder):
    _, whole = load(folder)
    shard(folder)
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], whole)


def test_harmless_extras_are_accepted(folder):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    tensors(folder, lm_head__weight=embedding.copy(),
            model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4, np.float32))  # fmt: skip
    assert "lm_head" not in load(folder)[1]


def config(folder, **changes):
    now = json.loads((folder / "config.json").read_text()) | changes
    now = {k: v for k, v in now.items() if v != "absent"}
    (folder / "config.json").write_text(json.dumps(now))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


ONE = np.ones((1, 1), np.float32)
BROKEN = {
    "architecture": (lambda f: config(f, architectures=["MambaForCausalLM"]),
                     ["'MambaForCausalLM' is not supported", "only", "LlamaForCausalLM",
                      "Gemma3ForCausalLM"]),
    "model type": (lambda f: config(f, architectures=None, model_type="mamba"), ["mamba"]),
    "architecture kind": (lambda f: config(f, architectures=5), ["architectures", "5"]),
    "activation": (lambda f: config(f, hidden_act="tanh"), ["'tanh'", "'silu'"]),
    "rope": (lambda f: config(f, rope_parameters={"rope_type": "longrope"}),
             ["'longrope'", "'llama3'"]),
    "old rope": (lambda f: config(f, rope_parameters=None, rope_scaling={"type": "dynamic"}),
                 ["'dynamic'"]),
    "bad rope": (lambda f: config(f, rope_parameters=3), ["rope_parameters 3"]),
    "partial rope": (lambda f: config(f, rope_parameters={"partial_rotary_factor": 0.5}),
                     ["partial_rotary_factor"]),
    "llama3 numbers": (lambda f: config(f, rope_parameters={"rope_type": "llama3", "factor": "x"}),
                       ["factor", "low_freq_factor", "original_max_position_embeddings"]),
    "llama3 order": (lambda f: config(f, rope_parameters=LLAMA3 | {"low_freq_factor": 9}),
                     ["high_freq_factor above"]),
    "keys": (lambda f: config(f, vocab_size="absent", hidden_size="absent"),
             ["vocab_size, hidden_size"]),
    "values": (lambda f: config(f, vocab_size="big", num_hidden_layers=0, rms_norm_eps=-1),
               ["vocab_size='big'", "num_hidden_layers=0", "rms_norm_eps=-1"]),
    "heads": (lambda f: config(f, num_key_value_heads=3), ["4 is not a multiple", "heads=3"]),
    "odd heads": (lambda f: config(f, head_dim=7), ["head_dim=7"]),
    "uneven heads": (lambda f: config(f, head_dim=None, hidden_size=30), ["hidden_size=30"]),
    "json": (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
    "json kind": (lambda f: (f / "config.json").write_text("[]"), ["not a JSON object"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json does not exist"]),
    "tensors": (lambda f: tensors(f, model__norm__weight=None, model__spare=ONE,
                                  lm_head__weight=ONE * 2, model__embed_tokens__weight=ONE),
                ["missing model.norm.weight", "extra model.spare", "tied, yet not equal",
                 "model.embed_tokens.weight is (1, 1), not (61, 32)"]),
    "integers": (lambda f: tensors(f, model__norm__weight=np.ones(32, np.int8)), ["I8"]),
    "truncated": (lambda f: truncate(f / "model.safetensors"), ["damaged", "fetch it again"]),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), ["damaged"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["has none"]),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
               ["pytorch_model.bin", "pickle"]),
    "traversal": (lambda f: shard(f, second="../model.safetensors"), ["outside the folder"]),
    "absolute": (lambda f: shard(f, second="/etc/passwd"), ["outside the folder"]),
    "no shard": (lambda f: shard(f, second="gone.safetensors"), ["lacks the shards gone"]),
    "lying index": (lambda f: shard(f, second="model-00001-of-00002.safetensors"), ["missing "]),
    "index": (lambda f: (shard(f), (f / "model.safetensors.index.json").write_text("{}")),
              ["weight_map"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN, ids=lambda name: name.replace(" ", "-"))
def test_a_broken_folder_is_one_clear_line(folder, case):
    spoil, words = BROKEN[case]
    spoil(folder)
    with pytest.raises(UserError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", ["nobody/no-such-model-lmj", "not a name", "a/b/c/d"])
def test_an_unknown_model_is_one_clear_line(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        load(name)
    assert "\n" not in str(error.value)
    assert "neither a local folder nor reachable on the hub" in str(error.value)


def test_resolve(folder):
    assert resolve(str(folder)) == folder
    with pytest.raises(UserError, match="leave revision out"):
        resolve(folder, "main")


def test_save_refuses_what_it_would_spoil(folder, tmp_path):
    model, params = load(folder)
    with pytest.raises(UserError, match="not an empty folder"):
        save(folder, model, params)
    with pytest.raises(UserError, match="not an empty folder"):
        save(folder / "config.json", model, params)
    wrong = {**params, "norm": {"scale": jnp.ones(3)}, "spare": {"scale": jnp.ones(3)}}
    del wrong["layers_1"]
    with pytest.raises(UserError) as error:
        save(tmp_path / "new", model, wrong)
    for word in ("norm/scale is (3,), not (32,)", "extra spare", "missing layers_1/mlp"):
        assert word in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_save_copies_the_tokenizer_and_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    kept = {"tokenizer.json", "chat_template.jinja", "sentencepiece.bpe.model"}
    for name in (*kept, "secret.txt"):
        (folder / name).write_text(name)
    model, params = load(folder)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", model, params, tokenizer_from=folder)
    names = {"config.json", "model.safetensors", *kept}
    assert {p.name for p in (tmp_path / "empty").iterdir()} == names

    def full_disk(*_):
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "later", model, params, tokenizer_from=folder)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "empty"}


def test_config_of_both_generations_of_transformers():
    new = {**BASE, "architectures": ["LlamaForCausalLM"], "eos_token_id": [2, 5]}
    old = new | {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    new = new | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}
    config = LlamaConfig.from_hf(new)
    assert config == LlamaConfig.from_hf(old)
    assert (config.eos_token_id, config.head_dim, config.num_key_value_heads) == ((2, 5), 8, 4)
    assert config == LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    assert hash(Llama(config)) == hash(Llama(config))
