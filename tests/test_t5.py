"""T5 equals transformers' torch model under every option; PEFT's adapters for it are ours."""

import copy
import json
import shutil
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_mini_jax import LoRA, LoRAMini, init, linen, merge, parameters, select
from lora_mini_jax import peft as exchange
from lora_mini_jax.errors import UserError
from lora_mini_jax.generation.generate import generate
from lora_mini_jax.models import T5Config, load, save
from lora_mini_jax.models.hub import load_config, load_decoder_config
from lora_mini_jax.models.t5 import init_cache
from lora_mini_jax.models.t5_layers import buckets
from tests.cases import randomised

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 61, "d_model": 24, "d_kv": 5, "d_ff": 28, "num_layers": 2, "num_heads": 3,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "relu": {},
    "flan": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 8,
             "num_decoder_layers": 3},
    "silu": {"feed_forward_proj": "gated-silu", "num_decoder_layers": 1, "num_heads": 5,
             "relative_attention_num_buckets": 7, "relative_attention_max_distance": 9,
             "layer_norm_epsilon": 1e-2, "decoder_start_token_id": 3},
}  # fmt: skip
SOURCES = [[5, 1], [7, 9, 11, 4, 33, 1], [8] * 3 + [21, 22, 23] * 6 + [1]]


@pytest.fixture(scope="module")
def oracles(tmp_path_factory):
    """``oracles(case)``: the folder and the torch model of a case, in which every number counts."""
    root = tmp_path_factory.mktemp("t5")

    @cache
    def get(case):
        torch.manual_seed(0)
        config = transformers.T5Config(**BASE | CASES[case])
        hf = transformers.T5ForConditionalGeneration(config)
        if CASES[case].get("tie_word_embeddings") is False:  # transformers 5 ties a fresh one
            hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.detach().clone())
        with torch.no_grad():
            for name, p in hf.named_parameters():
                p.add_(torch.randn_like(p) * (0.5 if name.endswith("o.weight") else 0.1))
            # Small beside what layers add, or the tied head says each token again.
            hf.shared.weight.mul_(0.1)
        hf.save_pretrained(root / case)
        return root / case, hf.eval()

    return get


@cache
def read(folder, **options):
    return load(folder, **options)


def tokens_of(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(3, 61, shape), jnp.int32)


TOKENS, ANSWER = tokens_of((3, 19)), tokens_of((3, 14), seed=1).at[:, 0].set(0)
MASK = np.ones((3, 19), np.int32)
MASK[1, 13:] = MASK[2, :6] = 0
WRITTEN = np.ones((3, 14), np.int32)
WRITTEN[1, 9:] = 0


def run(model, params, *args, **kwargs):
    return jax.jit(model.apply)({"params": params}, *args, **kwargs)


def torch_logits(hf, tokens=TOKENS, answer=ANSWER, mask=MASK):
    given = {"input_ids": tokens, "decoder_input_ids": answer, "attention_mask": mask}
    with torch.no_grad():
        return hf(**{n: torch.tensor(np.asarray(x)) for n, x in given.items()}).logits.numpy()


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_with_padding_on_either_side(oracles, case):
    folder, hf = oracles(case)
    want = torch_logits(hf)
    got = run(*read(folder), TOKENS, ANSWER, MASK)
    assert got.dtype == jnp.float32
    close(got, want)
    scanned = run(*read(folder, scan_layers=True, remat="full"), TOKENS, ANSWER, MASK, WRITTEN)
    close(np.asarray(scanned)[WRITTEN > 0], want[WRITTEN > 0])
    assert np.isfinite(scanned).all()


def test_the_mask_has_a_default_and_padding_is_not_seen(oracles):
    folder, hf = oracles("relu")
    model, params = read(folder)
    ones = np.ones_like(MASK)
    close(run(model, params, TOKENS, ANSWER), torch_logits(hf, mask=ones))
    other = jnp.where(MASK > 0, TOKENS, 60)
    np.testing.assert_array_equal(run(model, params, other, ANSWER, MASK),
                                  run(model, params, TOKENS, ANSWER, MASK))  # fmt: skip


@pytest.mark.parametrize(("count", "longest"), [(32, 128), (8, 12), (7, 9), (4, 3), (64, 1000)])
def test_buckets_equal_transformers(count, longest):
    attention = transformers.models.t5.modeling_t5.T5Attention
    back = -torch.arange(1500)
    wanted = attention._relative_position_bucket(back, False, count, longest)
    np.testing.assert_array_equal(buckets(1500, count, longest), wanted)


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_equals_transformers(oracles, case):
    folder, hf = oracles(case)
    width = max(map(len, SOURCES))
    right = torch.tensor([s + [0] * (width - len(s)) for s in SOURCES])
    # Its cache counts the encoder's layers for the decoder.
    how = {"max_new_tokens": 16, "do_sample": False, "use_cache": False}
    out = hf.generate(right, attention_mask=(right > 0).long(), **how)
    wanted = []
    for row in out[:, 1:].tolist():
        wanted.append(row[: row.index(1)] if 1 in row else row)
    scan = case == "flan"
    assert generate(*read(folder, scan_layers=scan), SOURCES, max_new_tokens=16) == wanted
    assert len({t for row in wanted for t in row}) > 3  # not a constant


def test_adapted_text_is_the_merged_models_and_rows_end(oracles):
    folder, _ = oracles("flan")
    model, params = read(folder, scan_layers=True)
    targets = linen.targets(model, params, TOKENS, ANSWER)
    adapter = randomised(init(params, LoRA(2), select(targets, "SelfAttention|EncDec|wi")))
    got = generate(model, params, SOURCES, adapter=adapter, max_new_tokens=16, eos_id=())
    # Without any cache, by the adapted call: each token is the likeliest after those before it.
    given = jnp.asarray(SOURCES[1])[None], jnp.asarray([[0, *got[1][:-1]]])
    logits = jax.jit(linen.adapt(model))(params, adapter, *given)
    assert logits[0].argmax(axis=-1).tolist() == got[1]
    assert got != generate(model, params, SOURCES, max_new_tokens=16, eos_id=())
    row = got[1]
    short = generate(model, params, SOURCES, adapter=adapter, max_new_tokens=16, eos_id=row[5])
    assert short[1] == row[: row.index(row[5])]
    assert generate(model, params, []) == []


def test_sampled_tokens_have_the_models_probabilities(oracles):
    model, params = read(oracles("flan")[0], scan_layers=True)
    many = [SOURCES[1]] * 4000
    how: dict[str, Any] = {"temperature": 0.7, "top_p": 0.8, "eos_id": ()}
    got = [row[0] for row in generate(model, params, many, max_new_tokens=1, **how)]
    logits = run(model, params, jnp.asarray(SOURCES[1])[None], jnp.zeros((1, 1), jnp.int32))
    probs = np.asarray(jax.nn.softmax(logits[0, 0] / 0.7))
    likeliest = np.argsort(-probs)
    nucleus = likeliest[: 1 + np.searchsorted(np.cumsum(probs[likeliest]), 0.8)]
    counts = np.bincount(got, minlength=probs.size) / len(many)
    assert set(got) <= set(nucleus.tolist())
    kept = probs * np.isin(np.arange(probs.size), nucleus)
    np.testing.assert_allclose(counts, kept / kept.sum(), atol=0.04)


@pytest.mark.parametrize("scan", [False, True])
def test_cached_decoding_equals_the_full_forward(oracles, scan):
    model, params = read(oracles("flan")[0], scan_layers=scan)
    full, call = run(model, params, TOKENS, ANSWER, MASK), jax.jit(model.apply)
    kept = init_cache(model.config, 3, 20)
    first, kept = call({"params": params}, TOKENS, ANSWER[:, :5], MASK, cache=kept)
    second, kept = call({"params": params}, None, ANSWER[:, 5:], cache=kept)
    close(jnp.concatenate([first, second], axis=1), full)
    assert int(kept["length"]) == 14


def test_a_saved_model_is_the_same_in_transformers(oracles, tmp_path):
    for case in CASES:
        folder, hf = oracles(case)
        save(tmp_path / case, *load(folder, scan_layers=True))
        again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / case)
        assert type(again) is type(hf)
        np.testing.assert_array_equal(torch_logits(again.eval()), torch_logits(hf))
        assert load_config(tmp_path / case) == load_config(folder)


def test_scanned_layers_and_remat_change_no_gradient(oracles):
    folder, _ = oracles("flan")

    def grads(model, params):
        def loss(p):
            return jnp.mean(jnp.sin(model.apply({"params": p}, TOKENS, ANSWER, MASK)))

        return jax.jit(jax.grad(loss))(params)

    plain = grads(*read(folder))
    scanned = grads(*read(folder, scan_layers=True, remat="full"))
    for half, depth in (("encoder", 2), ("decoder", 3)):
        layers = [plain[half].pop(f"block_{i}") for i in range(depth)]
        plain[half]["block"] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                 scanned, plain)  # fmt: skip


def test_names(oracles):
    model, params = read(oracles("flan")[0])
    assert set(params) == {"shared", "encoder", "decoder", "lm_head"}
    names = exchange.names_of(model)
    wanted = {
        "decoder/block_2/layer_1/EncDecAttention/k/kernel":
            "decoder.block.2.layer.1.EncDecAttention.k.weight",
        "encoder/block_0/layer_1/DenseReluDense/wi_0/kernel":
            "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
        "decoder/relative_attention_bias/embedding":
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder/final_layer_norm/scale": "decoder.final_layer_norm.weight",
    }  # fmt: skip
    for path, name in wanted.items():
        assert names(path) == [name]
    assert len(names("decoder/block/layer_0/layer_norm/scale")) == 3
    assert len(names("encoder/block/layer_0/layer_norm/scale")) == 2
    assert "lm_head" not in read(oracles("relu")[0])[1]


def test_a_table_that_transformers_5_stored_once_is_the_head_too(oracles, tmp_path):
    folder = shutil.copytree(oracles("flan")[0], tmp_path / "once")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    hf = json.loads((folder / "config.json").read_text())
    new = hf | {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    (folder / "config.json").write_text(json.dumps(new))
    model, params = load(folder)
    assert not model.config.tie_word_embeddings  # its inputs are not scaled
    head = params["lm_head"]["kernel"]
    np.testing.assert_array_equal(head, params["shared"]["embedding"].T)
    _, want = read(oracles("flan")[0])
    want = {**want, "lm_head": {"kernel": want["shared"]["embedding"].T}}
    jax.tree.map(np.testing.assert_array_equal, params, want)
    save(tmp_path / "again", model, params)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "again")[1], want)


def test_copies_and_tables_of_no_use_are_passed_over(oracles, tmp_path):
    folder, _ = oracles("relu")
    shutil.copytree(folder, tmp_path / "old")
    tensors = load_file(folder / "model.safetensors")
    table = tensors["shared.weight"]
    for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = table.copy()
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unused] = np.ones((8, 3), np.float32)
    save_file(tensors, tmp_path / "old/model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "old")[1], read(folder)[1])
    tensors["lm_head.weight"] = table + 1
    save_file(tensors, tmp_path / "old/model.safetensors")
    with pytest.raises(UserError, match=r"tied, yet not equal to shared\.weight"):
        load(tmp_path / "old")


def test_what_a_file_does_not_say_is_as_in_transformers():
    sizes = {n: BASE[n] for n in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers",
                                  "num_heads")}  # fmt: skip
    got, hf = T5Config.from_hf(sizes), transformers.T5Config(**sizes)
    for name in vars(got):
        assert getattr(got, name) == (getattr(hf, name, None) or 0), name
    assert T5Config.from_hf(sizes | {"pad_token_id": 4}).decoder_start_token_id == 4
    new = {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    assert not T5Config.from_hf(sizes | new).tie_word_embeddings


BROKEN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "values": ({"d_model": "big", "layer_norm_epsilon": 0, "num_decoder_layers": -1,
                "relative_attention_num_buckets": 3},
               ["d_model='big'", "layer_norm_epsilon=0", "num_decoder_layers=-1", "buckets=3"]),
    "flags": ({"tie_word_embeddings": 1, "eos_token_id": "x"},
              ["tie_word_embeddings=1", "eos_token_id='x'"]),
    "keys": ({"d_kv": None, "num_heads": None}, ["missing d_kv, num_heads"]),
    "activation": ({"feed_forward_proj": "gated-mish"}, ["'gated-mish'", "'gated-gelu'"]),
    "two activations": ({"dense_act_fn": "silu", "is_gated_act": True},
                        ["dense_act_fn 'silu', is_gated_act True contradicts feed_forward_proj"]),
    "both ways": ({"is_causal": False}, ["is_causal False"]),
    "activation kind": ({"feed_forward_proj": {}}, ["feed_forward_proj={}"]),
    "distance": ({"relative_attention_max_distance": 4}, ["max_distance=4 is too small"]),
    "kind": ({"model_type": "umt5", "is_encoder_decoder": False},
             ["model_type 'umt5'", "is_encoder_decoder False"]),
    "encoder layers": ({"num_layers": 3}, ["missing encoder.block.2.layer.0.layer_norm.weight"]),
    "layers": ({"num_decoder_layers": 9999}, ["10001 layers"]),
    "sizes": ({"d_ff": 9}, ["is (28, 24), not (9, 24)"]),
    "untied": ({"tie_word_embeddings": False}, ["missing lm_head.weight"]),
    "start": ({"decoder_start_token_id": 61}, ["decoder_start_token_id=61", "vocab_size=61"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_config_is_one_clear_line(oracles, case, tmp_path):
    changes, words = BROKEN[case]
    folder = shutil.copytree(oracles("relu")[0], tmp_path / "model")
    hf = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(hf))
    with pytest.raises(UserError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_who_generates_what(oracles):
    folder, _ = oracles("relu")
    model, params = read(folder)
    with pytest.raises(UserError, match=r"does not continue text.*LlamaForCausalLM.*GPT2LMHead"):
        load_decoder_config(folder)
    with pytest.raises(UserError, match=r"prompt 0 is empty; prompt 1 has ids \[61\]"):
        generate(model, params, [[], [61]])
    with pytest.raises(UserError, match=r"cannot generate with a Dense: give a model .* or T5"):
        generate(nn.Dense(1), params, [[1]])


# PEFT

METHODS = {"lora": LoRA(2, alpha=3.0), "mini": LoRAMini(2, alpha=3.0, a=6, b=5)}


@pytest.mark.parametrize(("method", "scan"), [("lora", False), ("mini", True)])
def test_peft_computes_what_we_do_and_it_comes_back(oracles, method, scan, tmp_path):
    peft = pytest.importorskip("peft")
    folder, hf = oracles("flan")
    model, params = read(folder, scan_layers=scan)
    targets = linen.targets(model, params, TOKENS, ANSWER)
    whole = select(parameters(params, targets), "lm_head|decoder/final")
    adapter = init(params, METHODS[method], select(targets), modules_to_save=whole)
    adapter, names = randomised(adapter), exchange.names_of(model)
    exchange.save(tmp_path, adapter, params, names=names)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    theirs = torch_logits(peft.PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path))
    ours = jax.jit(linen.adapt(model))(params, adapter, TOKENS, ANSWER, MASK)
    assert np.abs(ours - run(model, params, TOKENS, ANSWER, MASK)).max() > 0.01
    close(ours, theirs)
    back = exchange.load(tmp_path, params, targets, names=names)
    close(run(model, merge(params, back), TOKENS, ANSWER, MASK), theirs)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_wrote_is_the_same_function_here(oracles, tmp_path):
    peft = pytest.importorskip("peft")
    folder, hf = oracles("relu")
    config = peft.LoraConfig(r=3, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
    adapted = peft.get_peft_model(copy.deepcopy(hf), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    adapted.save_pretrained(tmp_path)
    model, params = read(folder)
    targets = linen.targets(model, params, TOKENS, ANSWER)
    adapter = exchange.load(tmp_path, params, targets, names=exchange.names_of(model))
    assert len(adapter.sites) == 2 * 3 + 2 * 5
    close(run(model, merge(params, adapter), TOKENS, ANSWER, MASK), torch_logits(adapted.eval()))


def test_a_table_of_both_halves_is_not_for_peft(oracles):
    """PEFT would wrap ``shared``, which neither half looks at."""
    model, params = read(oracles("flan")[0])
    targets = linen.targets(model, params, TOKENS, ANSWER)
    adapter = init(params, LoRA(2), select(targets, "shared"))
    with pytest.raises(UserError, match="shared/embedding"):
        exchange.convert(adapter, params, names=exchange.names_of(model))
