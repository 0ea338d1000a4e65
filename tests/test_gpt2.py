"""GPT-2 equals transformers' torch model under every option; PEFT's adapters for it are ours."""

import copy
import json
import shutil
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_mini_jax import LoRA, LoRAMini, init, linen, merge, parameters, select
from lora_mini_jax import peft as exchange
from lora_mini_jax.errors import UserError
from lora_mini_jax.generation.generate import generate
from lora_mini_jax.methods import MiSS
from lora_mini_jax.models import GPT2, GPT2Config, load, save
from lora_mini_jax.models.attention import init_cache
from lora_mini_jax.models.hub import load_config, load_decoder_config
from tests.cases import randomised

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 61, "n_embd": 30, "n_layer": 2, "n_head": 3, "n_positions": 48,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied, by layer": {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True,
                         "n_inner": 17, "activation_function": "gelu", "n_head": 5},
    "unscaled, upcast": {"scale_attn_weights": False, "reorder_and_upcast_attn": True,
                         "n_embd": 21, "activation_function": "relu",
                         "layer_norm_epsilon": 1e-2},
}  # fmt: skip
PROMPTS = [[5], [7, 9, 11, 4, 33], [8] * 3 + [21, 22, 23] * 4]


@pytest.fixture(scope="module")
def oracles(tmp_path_factory):
    """``oracles(case)``: the folder and the torch model of a case, in which every number counts."""
    root = tmp_path_factory.mktemp("gpt2")

    @cache
    def get(case):
        torch.manual_seed(0)
        config = transformers.GPT2Config(**BASE | CASES[case], attn_implementation="eager")
        hf = transformers.GPT2LMHeadModel(config)
        with torch.no_grad():
            for p in hf.parameters():
                p.add_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.1))
        hf.save_pretrained(root / case)
        return root / case, hf.eval()

    return get


@cache
def read(folder, **options):
    return load(folder, **options)


def tokens_of(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(3, 61, shape), jnp.int32)


def run(model, params, *args, **kwargs):
    return jax.jit(model.apply)({"params": params}, *args, **kwargs)


def torch_logits(hf, tokens, **kwargs):
    kwargs = {name: torch.tensor(np.asarray(x)) for name, x in kwargs.items()}
    with torch.no_grad():
        return hf(torch.tensor(np.asarray(tokens)), **kwargs).logits.numpy()


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(oracles, case):
    folder, hf = oracles(case)
    tokens, valid = tokens_of((2, 20)), np.array([[1] * 20, [1] * 15 + [0] * 5])
    got = run(*read(folder), tokens)
    assert got.dtype == jnp.float32
    close(got, torch_logits(hf, tokens))
    scanned = run(*read(folder, scan_layers=True, remat="full"), tokens, None, jnp.asarray(valid))
    want = torch_logits(hf, tokens, attention_mask=valid)
    close(np.asarray(scanned)[valid > 0], want[valid > 0])


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_equals_transformers(oracles, case):
    folder, hf = oracles(case)
    width = max(map(len, PROMPTS))
    left = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    out = hf.generate(left, attention_mask=(left > 0).long(), max_new_tokens=12, do_sample=False)
    wanted = []
    for row in out[:, width:].tolist():
        wanted.append(row[: row.index(2)] if 2 in row else row)
    assert generate(*read(folder), PROMPTS, max_new_tokens=12) == wanted
    assert len({t for row in wanted for t in row}) > 3  # not a constant


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_text_up_to_one_token_past_the_last_position_equals_transformers(oracles):
    folder, hf = oracles("plain")
    prompt = tokens_of((40,), seed=2).tolist()
    out = hf.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None)
    wanted = out[0, 40:].tolist()
    assert len(wanted) == 9
    assert generate(*read(folder), [prompt, [5]], max_new_tokens=9, eos_id=())[0] == wanted


def test_a_saved_model_is_the_same_in_transformers(oracles, tmp_path):
    for case in CASES:
        folder, hf = oracles(case)
        save(tmp_path / case, *load(folder, scan_layers=True))
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / case, attn_implementation="eager"
        )
        assert type(again) is type(hf)
        tokens = tokens_of((1, 20))
        np.testing.assert_array_equal(torch_logits(again.eval(), tokens), torch_logits(hf, tokens))
        assert load_config(tmp_path / case) == load_decoder_config(folder)


def test_scanned_layers_and_remat_change_no_gradient(oracles):
    folder, _ = oracles("untied, by layer")
    tokens = tokens_of((2, 9))

    def grads(model, params):
        return jax.jit(jax.grad(lambda p: jnp.mean(jnp.sin(model.apply({"params": p}, tokens)))))(
            params
        )

    plain = grads(*read(folder))
    scanned = grads(*read(folder, scan_layers=True, remat="full"))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), plain.pop("h_0"), plain.pop("h_1"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                 scanned, plain | {"h": stacked})  # fmt: skip


def test_packing_and_the_cache_equal_separate_runs(oracles):
    folder, _ = oracles("untied, by layer")
    model, params = read(folder, scan_layers=True)
    tokens = tokens_of((2, 12))
    alone = run(model, params, tokens)
    packed = jnp.concatenate([tokens[:1, :5], tokens[1:], jnp.zeros((1, 3), jnp.int32)], axis=1)
    segments = jnp.array([[1] * 5 + [2] * 12 + [0] * 3])
    got = run(model, params, packed, jnp.array([[*range(5), *range(12), 0, 0, 0]]), segments)
    close(got[0, :5], alone[0, :5])
    close(got[0, 5:17], alone[1])
    assert np.isfinite(got).all()
    kept, parts, call = init_cache(model.config, 2, 14), [], jax.jit(model.apply)
    for cut in (slice(0, 6), slice(6, 12)):
        out, kept = call({"params": params}, tokens[:, cut], cache=kept)
        parts.append(out)
    close(jnp.concatenate(parts, axis=1), alone)
    assert int(kept["length"]) == 12


def test_names_and_layouts(oracles):
    _, params = read(oracles("untied, by layer")[0])
    assert set(params) == {"wte", "wpe", "h_0", "h_1", "ln_f", "lm_head"}
    assert set(params["h_0"]) == {"ln_1", "attn", "ln_2", "mlp"}
    assert params["h_1"]["attn"]["c_attn"]["kernel"].shape == (30, 90)
    assert params["lm_head"]["kernel"].shape == (30, 61)
    assert "lm_head" not in read(oracles("plain")[0])[1]


def rewrite(folder, to, change):
    """A copy of a folder with its tensors changed."""
    shutil.copytree(folder, to)
    save_file(change(load_file(folder / "model.safetensors")), to / "model.safetensors")
    return to


def test_files_without_prefix_and_with_buffers_are_read(oracles, tmp_path):
    """As the hub's first GPT-2 is."""
    folder, _ = oracles("plain")

    def old(tensors):
        tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
        tensors |= {f"h.{i}.attn.bias": np.tri(48, dtype=np.float32)[None, None] for i in (0, 1)}
        tensors["h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
        return tensors | {"lm_head.weight": tensors["wte.weight"].copy()}

    rewrite(folder, tmp_path / "old", old)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "old")[1], read(folder)[1])
    rewrite(folder, tmp_path / "bad", lambda t: old(t) | {"h.2.attn.c_attn.bias": np.ones(90)})
    with pytest.raises(UserError, match=r"extra transformer\.h\.2\.attn\.c_attn\.bias"):
        load(tmp_path / "bad")
    hf = json.loads((folder / "config.json").read_text())
    del hf["architectures"]
    (tmp_path / "old/config.json").write_text(json.dumps(hf))
    assert load_config(tmp_path / "old") == load_config(folder)


def test_what_a_file_does_not_say_is_as_in_transformers():
    sizes = {name: BASE[name] for name in ("vocab_size", "n_embd", "n_layer", "n_head")}
    got, hf = GPT2Config.from_hf(sizes), transformers.GPT2Config(**sizes)
    for name in vars(got):
        assert getattr(got, name) == getattr(hf, name), name
    assert GPT2Config.from_hf(sizes | {"eos_token_id": [3, 4]}).eos_token_id == (3, 4)
    assert GPT2Config.from_hf(sizes | {"eos_token_id": None}).eos_token_id is None


BROKEN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "heads": ({"n_head": 4}, ["n_embd=30", "n_head=4"]),
    "values": ({"n_embd": "big", "layer_norm_epsilon": 0, "n_inner": 0, "n_layer": 10**6},
               ["n_embd='big'", "layer_norm_epsilon=0", "n_inner=0", "n_layer=1000000"]),
    "flags": ({"scale_attn_weights": "yes", "eos_token_id": [1, "x"]},
              ["scale_attn_weights='yes'", "eos_token_id=(1, 'x')"]),
    "keys": ({"n_embd": None, "n_layer": None}, ["missing n_embd, n_layer"]),
    "activation": ({"activation_function": ["gelu"]}, ["activation_function", "'gelu_new'"]),
    "cross": ({"add_cross_attention": True, "model_type": "gptj"},
              ["add_cross_attention True", "model_type 'gptj'"]),
    "both ways": ({"is_causal": False}, ["is_causal False"]),
    "pruned": ({"pruned_heads": {"0": [1]}}, ["pruned_heads"]),
    "layers": ({"n_layer": 3}, ["missing transformer.h.2.ln_1.weight"]),
    "sizes": ({"n_inner": 9}, ["is (30, 120), not (30, 9)"]),
    "untied": ({"tie_word_embeddings": False}, ["missing lm_head.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_config_is_one_clear_line(oracles, case, tmp_path):
    changes, words = BROKEN[case]
    folder = shutil.copytree(oracles("plain")[0], tmp_path / "model")
    hf = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(hf))
    with pytest.raises(UserError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_too_many_tokens_are_refused(oracles):
    folder, _ = oracles("plain")
    model, params = read(folder)
    with pytest.raises(UserError, match="49 tokens are too many for a model of 48"):
        jax.eval_shape(model.apply, {"params": params}, jnp.ones((1, 49), jnp.int32))
    with pytest.raises(UserError, match="exceed the model's 48"):
        generate(model, params, [[3] * 40], max_new_tokens=10)


# PEFT

TOKENS = tokens_of((2, 7), seed=1)
MODULES = "c_attn|c_proj|c_fc"
METHODS = {"lora": LoRA(2, alpha=3.0), "mini": LoRAMini(2, alpha=3.0, a=6, b=5)}


@pytest.mark.parametrize(("method", "scan"), [("lora", False), ("mini", True)])
def test_peft_computes_what_we_do_and_it_comes_back(oracles, method, scan, tmp_path):
    peft = pytest.importorskip("peft")
    folder, hf = oracles("untied, by layer")
    model, params = read(folder, scan_layers=scan)
    targets = linen.targets(model, params, TOKENS)
    head = select(parameters(params, targets), "lm_head")
    adapter = init(params, METHODS[method], select(targets, MODULES), modules_to_save=head)
    adapter, names = randomised(adapter), exchange.names_of(model)
    exchange.save(tmp_path, adapter, params, names=names)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    theirs = torch_logits(peft.PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path), TOKENS)
    ours = jax.jit(linen.adapt(model))(params, adapter, TOKENS)
    assert np.abs(ours - run(model, params, TOKENS)).max() > 0.01
    close(ours, theirs)
    back = exchange.load(tmp_path, params, targets, names=names)
    close(run(model, merge(params, back), TOKENS), theirs)


def moved(adapted):
    """PEFT's model, its trained parameters moved from where they start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return adapted


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["LoraConfig", "VeraConfig"])
def test_what_peft_wrote_is_the_same_function_here(oracles, kind, tmp_path):
    peft = pytest.importorskip("peft")
    folder, hf = oracles("plain")
    config = getattr(peft, kind)(r=3, target_modules=MODULES.split("|"))
    adapted = moved(peft.get_peft_model(copy.deepcopy(hf), config))
    adapted.save_pretrained(tmp_path)
    model, params = read(folder)
    targets, names = linen.targets(model, params, TOKENS), exchange.names_of(model)
    adapter = exchange.load(tmp_path, params, targets, names=names)
    assert {site.target.path for site in adapter.sites} == {t.path for t in select(targets)}
    close(run(model, merge(params, adapter), TOKENS), torch_logits(adapted.eval(), TOKENS))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("module", ["wpe", "lm_head"])
def test_square_kernels_saved_whole_keep_their_layout(oracles, module, tmp_path):
    """Without such a kernel among its targets PEFT says ``fan_in_fan_out: false``; and the table of
    positions is never the head."""
    peft = pytest.importorskip("peft")
    folder, hf = oracles("plain" if module == "wpe" else "untied, by layer")
    config = peft.LoraConfig(r=3, target_modules=[module], modules_to_save=["attn.c_proj"])
    adapted = moved(peft.get_peft_model(copy.deepcopy(hf), config))
    adapted.save_pretrained(tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    assert written["fan_in_fan_out"] is False
    model, params = read(folder)
    targets, names = linen.targets(model, params, TOKENS), exchange.names_of(model)
    adapter = exchange.load(tmp_path / "theirs", params, targets, names=names)
    wanted = torch_logits(adapted.eval(), TOKENS)
    close(run(model, merge(params, adapter), TOKENS), wanted)
    exchange.save(tmp_path / "ours", adapter, params, names=names)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path / "ours")
    close(torch_logits(theirs.eval(), TOKENS), wanted)


def test_a_state_dict_may_hold_the_base_s_square_kernels(oracles):
    model, params = read(oracles("plain")[0])
    targets, names = linen.targets(model, params, TOKENS), exchange.names_of(model)
    kernel = params["h_0"]["attn"]["c_proj"]["kernel"]
    tensors = {"transformer.h.0.attn.c_proj.weight": kernel,
               "transformer.h.0.attn.c_attn.lora_A": np.ones((2, 30), np.float32),
               "transformer.h.0.attn.c_attn.lora_B": np.ones((90, 2), np.float32)}  # fmt: skip
    adapter = exchange.from_state_dict(tensors, params, targets, alpha=4, names=names)
    assert [site.target.path for site in adapter.sites] == ["h_0/attn/c_attn/kernel"]


def test_all_linear_is_every_kernel_and_miss_is_refused():
    """PEFT's MiSS knows no kernels that are stored (in, out)."""
    model = GPT2(GPT2Config(**BASE))
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    targets = linen.targets(model, params, TOKENS)
    assert len(select(targets)) == 8
    drawn = jax.tree.map(lambda s: jnp.zeros(s.shape), params)
    adapter = init(drawn, MiSS(2), select(targets, "c_fc"))
    with pytest.raises(UserError, match="no MiSS for kernels"):
        exchange.convert(adapter, drawn, names=exchange.names_of(model))
    arrays, config = exchange.convert(adapter, drawn, names=exchange.names_of(model), as_lora=True)
    assert (config["peft_type"], len(arrays)) == ("LORA", 4)
