"""Folders that real PEFT reads and writes: the same function there and here, the same tensors."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_mini_jax import LoRA, LoRAMini, Target, UserError, init, linen, merge, models, parameters
from lora_mini_jax import select as choose
from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.methods import (
    AdaLoRA,
    DiffoRA,
    DoRA,
    Full,
    LoRAFA,
    LoRAXS,
    MiSS,
    PiSSA,
    ReLoRA,
    SwitchLoRA,
    VeRA,
)
from lora_mini_jax.peft import convert, from_state_dict, load, names_of, save
from lora_mini_jax.peft.kinds import KINDS
from lora_mini_jax.quantized import quantize
from lora_mini_jax.saved import storage
from tests.cases import draws, randomised
from tests.pytorch import peft, torch, transformers

IDS = np.array([[1, 5, 7, 2, 9, 30]])
TWO = "q_proj|down_proj"  # (16, 16) and (24, 16)
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SHARED = Path(os.environ.get("LMJ_SHARED", Path(__file__).parents[2] / "shared"))
ROBERTA = SHARED / "models/roberta-base-mnli-lora-microsoft"


class World(NamedTuple):
    """A tiny Llama in torch and here, stacked or not; ``logits`` is compiled once for all."""

    torch: Any
    model: Any
    params: Any
    targets: tuple[Target, ...]
    logits: Callable[[Any], Any]

    def select(self, pattern: str) -> tuple[Target, ...]:
        return choose(self.targets, pattern)

    def ours(self, adapter: Any) -> Any:
        """The adapted logits; that merging is the adapted call is a law of tests/test_laws.py."""
        return self.logits(merge(self.params, adapter))

    def theirs(self, folder: Path) -> Any:
        """PEFT's logits with the adapter in a folder."""
        return run(peft.PeftModel.from_pretrained(copy.deepcopy(self.torch), folder))

    def adapter(self, method: Any, pattern: str = TWO, seed: int = 5, **more: Any) -> Any:
        return randomised(init(self.params, method, self.select(pattern), 3, **more), seed=seed)


def world(folder: Path, base: Any, **options: Any) -> World:
    model, params = models.load(folder, **options)
    logits = jax.jit(lambda params: model.apply({"params": params}, IDS))
    return World(base, model, params, linen.targets(model, params, IDS), logits)


def llama(folder: Path, kind: str = "Llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, **settings
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def home(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def tiny(home: Path) -> World:
    return world(home, llama(home))


@pytest.fixture(scope="module")
def stacked(home: Path, tiny: World) -> World:
    return world(home, tiny.torch, scan_layers=True)


def run(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def edit(folder: Path, **changes: Any) -> None:
    (folder / CONFIG).write_text(json.dumps({**config(folder), **changes}))


def retensor(folder: Path, change: Callable[[dict], dict]) -> None:
    save_file(change(load_file(folder / TENSORS)), folder / TENSORS)


def same_tensors(left: dict, right: dict) -> None:
    assert set(left) == set(right)
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


RANKS = {"down_proj": {"rank": 4, "alpha": 5.0}}
GATED = DiffoRA(LoRA(rank=2, alpha=3.0))
EXPORTS = {
    "lora": (LoRA(2, alpha=3.0), RANKS, False, "LORA"),
    "rslora": (LoRA(3, alpha=5.0, rslora=True), {"layers_1/.*q_proj": {"rank": 2}}, False, "LORA"),
    "lora-fa": (LoRAFA(2, alpha=3.0), {}, False, "LORA"),
    "dora": (DoRA(2, alpha=3.0), RANKS, False, "LORA"),
    "adalora": (AdaLoRA(3, target_rank=2, total_steps=9), {}, False, "ADALORA"),
    "pissa": (PiSSA(2, alpha=3.0), {}, False, "LORA"),
    "lora-mini": (LoRAMini(2, alpha=3.0, a=6, b=5), {"down_proj": {"rank": 3}}, False, "LORA"),
    "lora-xs": (LoRAXS(3), {}, False, "LORA"),
    "miss": (MiSS(3), {}, False, "MISS"),
    "miss-mini": (MiSS(4, mode="mini", mini_rank=2), {}, False, "MISS"),
    "miss-bat": (MiSS(4, mode="bat"), {}, False, "MISS"),
    "vera": (VeRA(5), {}, False, "VERA"),
    "miss-as-lora": (MiSS(3), {"down_proj": {"rank": 4}}, True, "LORA"),
    "miss-mini-as-lora": (MiSS(4, mode="mini", mini_rank=2), {}, True, "LORA"),
    "gated-as-lora": (GATED, {}, True, "LORA"),
}


def test_every_kind_goes_out():
    assert {peft_type for *_, peft_type in EXPORTS.values()} == set(KINDS)


@pytest.mark.parametrize("name", EXPORTS)
def test_peft_computes_what_we_do_and_it_comes_back(name: str, tiny: World, tmp_path: Path):
    method, overrides, as_lora, kind = EXPORTS[name]
    adapter = tiny.adapter(method, overrides=overrides)
    save(tmp_path / "out", adapter, tiny.params, as_lora=as_lora, base="a/base")
    assert config(tmp_path / "out")["peft_type"] == kind
    ours = tiny.ours(adapter)
    assert np.abs(ours - tiny.logits(tiny.params)).max() > 0.01
    close(ours, tiny.theirs(tmp_path / "out"))

    back = load(tmp_path / "out", tiny.params, tiny.targets)
    assert {leaf.dtype for leaf in jax.tree.leaves(back.trainable)} == {jnp.dtype("float32")}
    close(tiny.ours(back), ours)
    assert {s.method.name for s in back.sites} == {"lora" if kind == "LORA" and name != "dora"
                                                   else method.name}  # fmt: skip
    tensors, settings = convert(back, tiny.params)
    same_tensors(tensors, load_file(tmp_path / "out" / TENSORS))
    assert settings.items() <= config(tmp_path / "out").items()


def test_qwen2_with_its_biases_goes_out_and_comes_in(tmp_path: Path):
    at = world(tmp_path / "base", llama(tmp_path / "base", "Qwen2"))
    for method in (LoRA(2, alpha=3.0), LoRAMini(2, alpha=3.0, a=6, b=5)):
        adapter = at.adapter(method, "q_proj|v_proj|down_proj")
        save(tmp_path / method.name, adapter, at.params, names=names_of(at.model))
        assert np.abs(at.ours(adapter) - at.logits(at.params)).max() > 0.01
        close(at.ours(adapter), at.theirs(tmp_path / method.name))
    given = peft.LoraConfig(r=2, target_modules=["k_proj", "up_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(at.torch), given)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = load(tmp_path / "theirs", at.params, at.targets)
    close(at.ours(adapter), run(theirs))


def test_a_plain_lora_for_servers_has_one_rank_and_its_scale_within(tiny: World, tmp_path: Path):
    adapter = tiny.adapter(LoRA(2, alpha=3.0, rslora=True, dropout=0.1), overrides=RANKS)
    save(tmp_path / "out", adapter, tiny.params, as_lora=True)
    close(tiny.ours(adapter), tiny.theirs(tmp_path / "out"))
    written = config(tmp_path / "out")
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (4, 4, False)
    assert (written["rank_pattern"], written["alpha_pattern"]) == ({}, {})
    tensors = load_file(tmp_path / "out" / TENSORS)
    assert {t.shape[0] for key, t in tensors.items() if "lora_A" in key} == {4}
    own = adapter.trainable["layers_0/self_attn/q_proj/kernel"]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    update = tensors[key.format("B")] @ tensors[key.format("A")]
    np.testing.assert_allclose(update.T, 3.0 / 2**0.5 * own["A"] @ own["B"], atol=1e-6)


def test_the_adapted_call_is_peft_s_too_and_shared_leaves_go_out_twice(tiny: World, tmp_path: Path):
    adapter = tiny.adapter(LoRAMini(2, alpha=3.0, a=6, b=5), "q_proj|o_proj")
    first, *others = adapter.sites
    sites = (first, *(Site(site.target, site.method, first.target.path) for site in others))
    leaves = {group: {first.target.path: getattr(adapter, group)[first.target.path]}
              for group in ("trainable", "frozen")}  # fmt: skip
    shared = replace(adapter, sites=sites, **leaves)
    save(tmp_path / "out", shared, tiny.params, names=names_of(tiny.model))
    close(jax.jit(linen.adapt(tiny.model))(tiny.params, shared, IDS), tiny.theirs(tmp_path / "out"))


def test_only_the_adapted_modules_are_peft_s_layers(tiny: World, tmp_path: Path):
    adapter = tiny.adapter(LoRA(2), "layers_1/.*(q|v)_proj")
    save(tmp_path / "out", adapter, tiny.params)
    model: Any = peft.PeftModel.from_pretrained(copy.deepcopy(tiny.torch), tmp_path / "out")
    found = {name for name, module in model.base_model.model.named_modules()
             if hasattr(module, "lora_A")}  # fmt: skip
    assert found == {f"model.layers.1.self_attn.{n}_proj" for n in "qv"}


def test_tables_and_whole_modules_go_out_and_come_back(tiny: World, tmp_path: Path):
    everything = parameters(tiny.params, tiny.targets)
    whole = choose(everything, "lm_head|layers_0/(input_layernorm|mlp)|^norm")
    adapter = tiny.adapter(LoRA(2), "embed_tokens|q_proj", modules_to_save=whole)
    save(tmp_path / "out", adapter, tiny.params)
    close(tiny.ours(adapter), tiny.theirs(tmp_path / "out"))
    assert config(tmp_path / "out")["modules_to_save"] == [
        "lm_head", "model.layers.0.input_layernorm", "model.layers.0.mlp", "model.norm",
    ]  # fmt: skip
    back = load(tmp_path / "out", tiny.params, tiny.targets)
    close(tiny.ours(back), tiny.ours(adapter))
    assert {s.target for s in back.sites if isinstance(s.method, Full)} == set(whole)


QV = ["q_proj", "v_proj", "down_proj"]
IMPORTS = {
    "lora": (
        "LoraConfig",
        {"r": 2, "lora_alpha": 5, "target_modules": [*QV, "embed_tokens"]},
        LoRA,
    ),
    "rslora": (
        "LoraConfig",
        {"r": 2, "lora_alpha": 5, "use_rslora": True, "lora_dropout": 0.1,
         "target_modules": r".*\.(q|v|down)_proj", "alpha_pattern": {"v_proj": 7},
         "rank_pattern": {r"layers\.1\.mlp.down_proj": 3},
         "modules_to_save": ["lm_head", "post_attention_layernorm"]},
        LoRA,
    ),
    "dora": (
        "LoraConfig",
        {"r": 2, "lora_alpha": 5, "use_dora": True, "target_modules": QV,
         "layers_to_transform": [1]},
        DoRA,
    ),
    "adalora": (
        "AdaLoraConfig",
        {"init_r": 3, "target_r": 2, "lora_alpha": 5, "total_step": 9, "target_modules": QV},
        AdaLoRA,
    ),
    "miss": ("MissConfig", {"r": 3, "target_modules": QV}, MiSS),
    "bat": ("MissConfig", {"r": 4, "init_weights": "bat", "target_modules": QV}, MiSS),
    "vera": ("VeraConfig", {"r": 5, "target_modules": QV}, VeRA),
}  # fmt: skip


def from_peft(tiny: World, folder: Path, name: str) -> Any:
    """PEFT's logits with an adapter of its own, which it has written to a folder."""
    kind, settings, _ = IMPORTS[name]
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(tiny.torch), getattr(peft, kind)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return run(model)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", IMPORTS)
def test_what_peft_wrote_is_the_same_function_here(name: str, tiny: World, tmp_path: Path):
    theirs = from_peft(tiny, tmp_path, name)
    adapter = load(tmp_path, tiny.params, tiny.targets)
    close(tiny.ours(adapter), theirs)
    assert {type(s.method) for s in adapter.sites} - {Full} == {IMPORTS[name][2]}
    dropout = IMPORTS[name][1].get("lora_dropout", 0.0)
    assert {s.method.dropout for s in adapter.sites if s.method != Full()} == {dropout}
    there = load_file(tmp_path / TENSORS)
    base = {k: v for k, v in there.items() if ".base_layer." in k}
    assert bool(base) == (name == "lora")  # PEFT adds the tables that it adapts
    tensors, _ = convert(adapter, tiny.params)
    assert set(tensors) == set(there) - set(base)
    for key, tensor in tensors.items():
        np.testing.assert_allclose(tensor, there[key], atol=1e-7, rtol=0, err_msg=key)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["lora", "dora", "adalora"])
def test_a_file_may_have_a_higher_rank_than_a_new_adapter(
    name: str, tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kind, settings, method = IMPORTS[name]
    wide = {"r": 20, "init_r": 20, "target_r": 20, "modules_to_save": None}
    own = {k: wide.get(k, v) for k, v in settings.items()}
    monkeypatch.setitem(IMPORTS, name, (kind, own | {"target_modules": ["q_proj"]}, method))
    theirs = from_peft(tiny, tmp_path / "peft", name)
    adapter = load(tmp_path / "peft", tiny.params, tiny.targets)
    close(tiny.ours(adapter), theirs)
    storage.save(tmp_path / "ours", adapter, tiny.params)
    close(tiny.ours(storage.load(tmp_path / "ours", tiny.params)), theirs)
    with pytest.raises(UserError, match="rank 20 exceeds"):
        tiny.adapter(adapter.sites[0].method, "q_proj")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_kernels_saved_whole_replace_quantised_ones(tiny: World, tmp_path: Path):
    given = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj", "lm_head"])
    model = peft.get_peft_model(copy.deepcopy(tiny.torch), given)
    model.save_pretrained(tmp_path / "peft")
    base = quantize(tiny.params, tiny.select("up_proj|v_proj"), "int8")
    adapter = load(tmp_path / "peft", base, tiny.targets)
    merged = merge(base, adapter)
    for name in ("up_proj", "gate_proj"):
        kernel = merged["layers_0"]["mlp"][name]["kernel"]
        close(kernel, tiny.params["layers_0"]["mlp"][name]["kernel"])
    save(tmp_path / "out", adapter, base)
    there = load_file(tmp_path / "peft" / TENSORS)
    for key, tensor in load_file(tmp_path / "out" / TENSORS).items():
        close(tensor, there[key])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_factors_from_a_file_stay_with_the_adapter(tiny: World, tmp_path: Path):
    from_peft(tiny, tmp_path / "peft", "vera")
    adapter = load(tmp_path / "peft", tiny.params, tiny.targets)
    storage.save(tmp_path / "ours", adapter, tiny.params, store_outer=True)
    back = storage.load(tmp_path / "ours", tiny.params)
    jax.tree.map(np.testing.assert_array_equal, back.factors(), adapter.factors())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_keys_need_no_prefix_and_may_hold_the_adapter_s_name(tiny: World, tmp_path: Path):
    theirs = from_peft(tiny, tmp_path, "lora")
    for old, new in {"base_model.model.": "", "lora_A.weight": "lora_A.mine.weight",
                     "embedding_B": "embedding_B.mine"}.items():  # fmt: skip
        retensor(
            tmp_path, lambda found, o=old, n=new: {k.replace(o, n): v for k, v in found.items()}
        )
    close(tiny.ours(load(tmp_path, tiny.params, tiny.targets)), theirs)
    half = {k: v.astype(jnp.bfloat16) for k, v in load_file(tmp_path / TENSORS).items()
            if "base_layer" not in k}  # fmt: skip
    save_file(half, tmp_path / TENSORS)
    adapter = load(tmp_path, tiny.params, tiny.targets)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter.trainable)} == {jnp.dtype("float32")}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_copies_of_the_base_may_be_rounded_there_or_here(tiny: World, home: Path, tmp_path: Path):
    from_peft(tiny, tmp_path, "lora")
    base, own = models.load(home, param_dtype=jnp.bfloat16)[1], load_file(tmp_path / TENSORS)
    assert (
        load(tmp_path, base, tiny.targets).sites == load(tmp_path, tiny.params, tiny.targets).sites
    )
    save_file({k: v.astype(jnp.bfloat16) for k, v in own.items()}, tmp_path / TENSORS)
    for params in (tiny.params, base):
        assert load(tmp_path, params, tiny.targets).sites
    key = next(k for k in own if "base_layer" in k)
    retensor(tmp_path, lambda found: found | {key: found[key] * 1.01})
    with pytest.raises(UserError, match="is another than the base's"):
        load(tmp_path, base, tiny.targets)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_with_a_name_is_in_a_folder_of_its_own(tiny: World, tmp_path: Path):
    given = peft.LoraConfig(r=2, target_modules=QV)
    theirs = peft.get_peft_model(copy.deepcopy(tiny.torch), given, adapter_name="mine")
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"in folders of their own: give {tmp_path}/mine"):
        load(tmp_path, tiny.params, tiny.targets)
    assert len(load(tmp_path / "mine", tiny.params, tiny.targets).sites) == 6


def test_stacked_layers_there_and_back(tiny: World, stacked: World, tmp_path: Path):
    whole = choose(parameters(stacked.params, stacked.targets), "input_layernorm")
    mini = stacked.adapter(LoRAMini(2, alpha=3.0, a=6, b=5), modules_to_save=whole)
    vera = stacked.adapter(VeRA(4))
    for name, adapter in {"mini": mini, "vera": vera}.items():
        save(tmp_path / name, adapter, stacked.params)
        close(stacked.ours(adapter), tiny.theirs(tmp_path / name))
        back = load(tmp_path / name, stacked.params, stacked.targets, names=names_of(stacked.model))
        close(stacked.ours(back), stacked.ours(adapter))
    apart = load(tmp_path / "mini", tiny.params, tiny.targets)
    close(tiny.ours(apart), stacked.ours(mini))
    from_peft(tiny, tmp_path / "peft", "rslora")
    with pytest.raises(UserError, match="layers/mlp/down_proj/kernel stacks layers of different"):
        load(tmp_path / "peft", stacked.params, stacked.targets)
    from_peft(tiny, tmp_path / "one", "dora")
    with pytest.raises(UserError, match="layers/self_attn/v_proj/kernel stacks layers of which"):
        load(tmp_path / "one", stacked.params, stacked.targets)


def dotted(path: str) -> list[str]:
    return [path.replace("/", ".").replace("kernel", "weight")]


class Plain(torch.nn.Module):
    """GPT-2's layer, which keeps (in, out), twice by one name."""

    def __init__(self, wrapped: bool = True):
        super().__init__()
        self.up = transformers.pytorch_utils.Conv1D(6, 8)
        self.head = transformers.pytorch_utils.Conv1D(8, 8)
        if wrapped:
            self.inner = Plain(wrapped=False)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_kernels_that_keep_their_layout_and_names_that_end_alike(tmp_path: Path):
    base = Plain()
    params = draws({name: {"kernel": jnp.zeros((8, n)), "bias": jnp.zeros(n)}
                    for name, n in {"up": 6, "head": 8}.items()})  # fmt: skip
    params["inner"] = draws(params, seed=1)
    with torch.no_grad():
        for name, value in base.named_parameters():
            *path, leaf = name.split(".")
            at = params
            for part in (*path, {"weight": "kernel"}.get(leaf, leaf)):
                at = at[part]
            value.copy_(torch.tensor(np.array(at)))
    kernels = [Target(f"{path}/kernel", (8, n)) for path, n in {"up": 6, "inner/head": 8}.items()]
    biased = Target("inner/head/bias", (8,), ins=(), outs=(0,), kind="array")
    adapter = randomised(
        init(params, DoRA(2), kernels[:1], modules_to_save=[kernels[1], biased])
    )  # fmt: skip
    save(tmp_path / "out", adapter, params, fan_in_fan_out=True, names=dotted)
    assert config(tmp_path / "out")["target_modules"] == "(?:up)"  # not ["up"]: there is inner.up

    model = peft.PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    merged = merge(params, adapter)
    for module, at in ((model, merged), (model.inner, merged["inner"])):
        for name in ("up", "head"):
            close(at[name]["kernel"], getattr(module, name).weight.detach())
            close(at[name]["bias"], getattr(module, name).bias.detach())
    back = load(tmp_path / "out", params, kernels, names=dotted)
    jax.tree.map(close, merge(params, back), merged)


BAD = {
    "a pickle": ("has only adapter_model.bin, which is a pickle", None, None),
    "no file": ("no such file: .*adapter_model.safetensors$", None, None),
    "settings": (
        r"layer_replication=\[\[0, 1\]\], .*use_qalora=True, .*init_lora_weights='pissa', which is "
        r"not supported: merge the adapter into its model in PEFT \(merge_and_unload\) and load",
        {"layer_replication": [[0, 1]], "use_qalora": True,
         "trainable_token_indices": [1], "init_lora_weights": "pissa"},
        None,
    ),
    "a setting of tomorrow": ("use_magic=True", {"use_magic": True}, None),
    "another method": ("peft_type 'IA3': supported are LORA", {"peft_type": "IA3"}, None),
    "a wrong type": ("rank is 'two'", {"r": "two", "rank_pattern": {}}, None),
    "kinds of settings": (
        r"target_modules is 5, neither .*; exclude_modules is '\(', neither .*; modules_to_save is "
        r"'lm_head', no list .*; layers_to_transform is '0', neither .*; layers_pattern is \[5\], "
        r"neither .*; use_dora is 'no', neither true nor false: correct it",
        {"target_modules": 5, "exclude_modules": "(", "modules_to_save": "lm_head",
         "layers_to_transform": "0", "layers_pattern": [5], "use_dora": "no"},
        None,
    ),
    "patterns": (
        r"rank_pattern is \['q_proj'\], no object .*; alpha_pattern is 2, no object",
        {"rank_pattern": ["q_proj"], "alpha_pattern": 2}, None,
    ),
    "saved names": (r"modules_to_save is \['\('\], no list", {"modules_to_save": ["("]}, None),
    "a list of methods": (r"peft_type \['LORA'\]: supported are", {"peft_type": ["LORA"]}, None),
    "tensors": (
        r"layers.0.self_attn.v_proj.lora_B is missing.*layers.1.mlp.down_proj.lora_A is \(1, 24\), "
        r"not \(2, 24\).*model.layers.9.q_proj.lora_A is extra.*bias.* is extra",
        {},
        "some",
    ),
    "a whole module": (r"layers.0.self_attn.q_proj.lora_A is missing", {}, "module"),
    "another base": ("embed_tokens.weight is another than the base's", {}, "base"),
}  # fmt: skip


def spoil(how: str | None, found: dict) -> dict:
    at = "base_model.model.model.layers"
    if how == "some":
        del found[f"{at}.0.self_attn.v_proj.lora_B.weight"]
        found[f"{at}.1.mlp.down_proj.lora_A.weight"] = np.ones((1, 24), np.float32)
        found[f"{at}.9.q_proj.lora_A.weight"] = found["bias"] = np.ones((2, 2), np.float32)
    if how == "module":
        return {k: v for k, v in found.items() if "layers.0.self_attn.q_proj" not in k}
    if how == "base":
        key = "base_model.model.model.embed_tokens.base_layer.weight"
        found[key] = found[key] + 1
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", BAD)
def test_a_folder_that_cannot_be_read_says_why(case: str, tiny: World, tmp_path: Path):
    message, settings, how = BAD[case]
    from_peft(tiny, tmp_path, "lora")
    if settings is None:
        (tmp_path / TENSORS).unlink()
        if case == "a pickle":
            (tmp_path / "adapter_model.bin").touch()
    else:
        edit(tmp_path, **settings)
        retensor(tmp_path, lambda found: spoil(how, found))
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path, tiny.params, tiny.targets)
    assert "\n" not in str(raised.value)


REFUSED = {
    "switchlora": (SwitchLoRA(2), False, "switchlora, .* is no product of thin .*merge it"),
    "relora": (ReLoRA(2), True, "relora, .* is no product .*: merge it"),
    "bat as LoRA": (MiSS(4, mode="bat"), True, "miss, .*mode='bat'.*leave out as_lora"),
    "dora as LoRA": (DoRA(2), True, "dora, .* is no product of .*leave out as_lora"),
    "full": (Full(), False, "full fine-tuning alone .*merge"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_methods_without_such_a_form_are_to_be_merged(case: str, tiny: World, tmp_path: Path):
    method, as_lora, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        save(tmp_path / "out", tiny.adapter(method), tiny.params, as_lora=as_lora)
    assert not list(tmp_path.iterdir())


def test_kernels_of_two_kinds_go_out_as_plain_lora_only(tiny: World, tmp_path: Path):
    one, two = (tiny.adapter(m, p) for m, p in ((MiSS(3), "q_proj"), (LoRA(2), "v_proj")))
    groups = {g: {**getattr(one, g), **getattr(two, g)} for g in ("trainable", "frozen")}
    mixed = replace(one, sites=one.sites + two.sites, **groups)
    with pytest.raises(UserError, match=r"peft_type is LORA, MISS: .*as_lora=True"):
        save(tmp_path / "out", mixed, tiny.params)
    save(tmp_path / "out", mixed, tiny.params, as_lora=True)
    close(tiny.ours(mixed), tiny.theirs(tmp_path / "out"))
    dropped = tiny.adapter(LoRA(2), overrides={"q_proj": {"dropout": 0.1}})
    with pytest.raises(UserError, match=r"lora_dropout is 0\.0, 0\.1"):
        save(tmp_path / "out", dropped, tiny.params)


def test_what_peft_would_do_otherwise_is_refused(tiny: World, tmp_path: Path):
    head = {n: v for n, v in tiny.params.items() if n != "lm_head"}
    table = init(head, LoRA(2), tiny.select("embed_tokens"))
    with pytest.raises(UserError, match="embed_tokens/embedding may be the output head too"):
        save(tmp_path / "out", table, head)
    words = {**head, "lm_head": {"dense": jnp.ones((16, 16)), "bias": jnp.ones(32)}}
    with pytest.raises(UserError, match="embed_tokens/embedding may be the output head too"):
        save(tmp_path / "out", table, words)  # as RoBERTa's head is
    with pytest.raises(UserError, match="parameters up are not a Llama's: give names"):
        save(tmp_path / "out", table, {"up": {}})
    with pytest.raises(UserError, match=r"int is none of the models .*give names"):
        names_of(1)
    save(tmp_path / "out", init(tiny.params, LoRA(2), tiny.select("embed_tokens")), tiny.params)
    with pytest.raises(UserError, match="embed_tokens/embedding may be the output head too"):
        load(tmp_path / "out", head, [t for t in tiny.targets if "lm_head" not in t.path])

    up, two = Target("up/kernel", (4, 4)), {"up": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    bias = next(t for t in parameters(two, [up]) if t.kind == "array")
    both = init(two, LoRA(2), [up], modules_to_save=[bias])
    gained = {"up": {"kernel": two["up"]["kernel"], "gain": jnp.ones(4)}}
    gain = init(gained, LoRA(2), [up], modules_to_save=choose(parameters(gained, [up]), "gain"))
    with pytest.raises(UserError, match="up: PEFT saves whole modules, and of adapted ones the bi"):
        save(tmp_path / "out", gain, gained, names=dotted)
    whole = choose(parameters(two, [up]), "kernel|bias")
    more = {**two, "rows": {"down": {"kernel": jnp.ones((4, 4))}, "up": two["up"]}}
    down = init(more, LoRA(2), [Target("rows/down/kernel", (4, 4))], modules_to_save=whole)
    with pytest.raises(UserError, match=r"modules_to_save up: PEFT would take rows\.up for one"):
        save(tmp_path / "out", down, more, names=dotted)
    with pytest.raises(UserError, match="both named one"):
        save(tmp_path / "out", both, two, names=lambda path: ["one"])


def test_a_state_dict_without_its_half_says_so():
    params, targets = {"up": {"kernel": np.ones((4, 6))}}, [Target("up/kernel", (4, 6))]
    a, b = np.ones((2, 4), np.float32), np.ones((6, 3), np.float32)
    given = {"params": params, "targets": targets, "alpha": 4, "names": dotted}
    for tensors, message in (
        ({"up.lora_A": a}, r"up.lora_B is missing"),
        ({"up.lora_A": a, "up.lora_B": b}, r"up.lora_B is \(6, 3\), not \(6, 2\)"),
        ({"up.lora_magnitude_vector": b[:, 0]}, r"up.lora_A is missing; up.lora_B is missing"),
        ({"up.lora_A": a, "up.lora_A.other.weight": a}, "of a second adapter"),
        ({"up.lora_A": a.astype(int)}, "up.lora_A is int64, not a float"),
    ):
        with pytest.raises(UserError, match=message):
            from_state_dict(tensors, **given)  # ty: ignore[invalid-argument-type]
    with pytest.raises(UserError, match="key_map gives two tensors the same key"):
        from_state_dict({"a": a, "b": b}, **given, key_map=lambda key: "up.lora_A")  # ty: ignore[invalid-argument-type]


def test_a_file_of_eight_bits_says_so(tmp_path: Path):
    """Which NumPy has no dtype for."""
    given = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["up"]}
    (tmp_path / CONFIG).write_text(json.dumps(given))
    header = b'{"up.lora_A":{"dtype":"F8_E4M3","shape":[1,4],"data_offsets":[0,4]}}'
    (tmp_path / TENSORS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    params, targets = {"up": {"kernel": np.ones((4, 6))}}, [Target("up/kernel", (4, 6))]
    words = "a dtype that NumPy lacks .*float8.*: fetch it again, with tensors of 16 or 32 bits"
    with pytest.raises(UserError, match=words) as raised:
        load(tmp_path, params, targets, names=dotted)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(not ROBERTA.is_dir(), reason="the model is not here")
def test_microsoft_s_own_lora_of_roberta():
    tensors = load_file(ROBERTA / "roberta_base_lora_mnli.safetensors")
    targets = [Target(f"layer_{i}/{name}/kernel", (768, 768)) for i in range(12)
               for name in ("query", "value")]  # fmt: skip
    params = {f"layer_{i}": {n: {"kernel": np.zeros((768, 768), np.float32)}
                             for n in ("query", "value")} for i in range(12)}  # fmt: skip

    def names(path: str) -> list[str]:
        layer, name, _ = path.split("/")
        number = layer.removeprefix("layer_")
        return [f"roberta.encoder.layer.{number}.attention.self.{name}.weight"]

    with pytest.raises(UserError, match=r"classifier.dense.bias is extra"):
        from_state_dict(tensors, params, targets, alpha=16, names=names)
    adapter = from_state_dict(
        tensors,
        params,
        targets,
        alpha=16,
        names=names,
        key_map=lambda key: key if ".lora_" in key else None,
    )
    assert {site.method for site in adapter.sites} == {LoRA(rank=8, alpha=16.0)}
    at = "roberta.encoder.layer.11.attention.self.value.lora_{}"
    update = 2 * tensors[at.format("B")] @ tensors[at.format("A")]
    assert np.abs(update).max() > 0.01
    own = adapter.trainable["layer_11/value/kernel"]
    np.testing.assert_allclose(2 * own["A"] @ own["B"], update.T, atol=1e-5)
