"""Files of PEFT's that are not read as they are: what the refusal says to do, done with real PEFT;
and AdaLoRA as it is once it has been pruned."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_mini_jax import LoRAMini, UserError, init, linen, merge, models, select
from lora_mini_jax.methods import AdaLoRA
from lora_mini_jax.peft import load, names_of, save
from tests.pytorch import peft, torch, transformers

IDS = np.array([[1, 5, 7, 2, 9, 30]])
QV = ["q_proj", "v_proj", "down_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class World:
    """A tiny Llama in torch and here."""

    def __init__(self, folder: Path, base: Any, **options: Any):
        self.torch = base
        base.save_pretrained(folder)
        self.model, self.params = models.load(folder, **options)
        self.targets = linen.targets(self.model, self.params, IDS)

    def ours(self, folder: Path) -> Any:
        """The logits with the adapter in a folder."""
        return self.logits(self.load(folder))

    def logits(self, adapter: Any) -> Any:
        return self.model.apply({"params": merge(self.params, adapter)}, IDS)

    def load(self, folder: Path) -> Any:
        return load(folder, self.params, self.targets, names=names_of(self.model))


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **settings)).eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> World:
    return World(tmp_path_factory.mktemp("llama"), llama())


def adapted(base: Any, name: str = "Lora", start: Path | None = None, **settings: Any) -> Any:
    """PEFT's model, its factors moved from where they start, where it is saved to ``start``."""
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(base), getattr(peft, f"{name}Config")(**settings))
    if start:
        model.save_pretrained(start)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return model


def run(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def refuses(at: World, folder: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        at.load(folder)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500 + len(str(folder))


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_pissa_and_olora_come_as_the_lora_that_peft_makes_of_them(
    how: str, tiny: World, tmp_path: Path
):
    start, out = tmp_path / "start", tmp_path / "out"
    model = adapted(
        tiny.torch, r=2, target_modules=QV, init_lora_weights=how, start=start
    )  # fmt: skip
    wanted = run(model)
    model.save_pretrained(out)
    refuses(tiny, out, rf"init_lora_weights='{how}', .*path_initial_model_for_weight_conversion=")
    model.save_pretrained(out, path_initial_model_for_weight_conversion=str(start))
    close(tiny.ours(out), wanted)


def test_vera_comes_with_its_random_factors(tiny: World, tmp_path: Path):
    old = adapted(tiny.torch, "Vera", r=3, target_modules=QV, save_projection=False)
    old.save_pretrained(tmp_path)
    refuses(tiny, tmp_path, r"save_projection=False.*anew from this config with save_projection=")
    config = peft.VeraConfig.from_pretrained(str(tmp_path))
    config.save_projection = True
    new = peft.get_peft_model(copy.deepcopy(tiny.torch), config)
    new.load_state_dict(old.state_dict(), strict=False)
    new.save_pretrained(tmp_path)
    close(tiny.ours(tmp_path), run(old))


@pytest.mark.parametrize("where", ["target_modules", "modules_to_save"])
def test_an_adapter_of_a_tied_head_is_read_once_the_head_is_untied(where: str, tmp_path: Path):
    base = llama(tie_word_embeddings=True)
    settings: Any = {"target_modules": ["q_proj"], where: ["lm_head"]}
    model = adapted(base, r=2, **settings)
    model.save_pretrained(tmp_path / "adapter")
    wanted = run(model)
    refuses(World(tmp_path / "tied", base), tmp_path / "adapter",
            r": lm_head\.\w+: the output head is the table of words here: .*clone")  # fmt: skip
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.clone())
    base.config.tie_word_embeddings = False
    close(World(tmp_path / "untied", base).ours(tmp_path / "adapter"), wanted)


def test_what_has_no_such_way_is_merged_and_long_values_are_cut(tiny: World, tmp_path: Path):
    adapted(tiny.torch, r=2, target_modules=QV).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    own = json.loads(file.read_text())
    long = list(range(999))
    for changes, words in (
        ({"init_lora_weights": "loftq"}, r"init_lora_weights='loftq', .*: merge the adapter into"),
        ({"use_magic": long}, r"use_magic=\[0, 1, 2, [\d, ]*, which is not supported: merge"),
        (
            {"init_lora_weights": "pissa", "use_magic": 1},
            r"use_magic=1, .*: merge the adapter into",
        ),
        ({"peft_type": long}, r"peft_type \[0, .*: supported are LORA, ADALORA, MISS, VERA; of an"),
        ({"rank_pattern": long}, r"rank_pattern is \[0, .*, no object of numbers"),
        ({"rank_pattern": {"q_proj": long}}, r"rank is \[0, 1, .*: give a whole number"),
        ({"lora_alpha": long, "alpha_pattern": {}}, "float"),
    ):
        file.write_text(json.dumps(own | changes))
        refuses(tiny, tmp_path, words)


def test_factors_that_are_to_come_from_data_are_no_adapter_yet(tiny: World, tmp_path: Path):
    method = LoRAMini(2, a=3, b=3, outer_init="gradient")
    adapter = init(tiny.params, method, select(tiny.targets, "q_proj"))
    with pytest.raises(UserError, match=r"come from data: call lora_mini_jax\.calibrate"):
        save(tmp_path / "out", adapter, tiny.params)
    assert not (tmp_path / "out").exists()


def pruned(base: Any, steps: int = 8) -> Any:
    """PEFT's AdaLoRA, trained to the end of its schedule or for some steps of it."""
    torch.manual_seed(1)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=1, lora_alpha=5, total_step=8, tinit=1, tfinal=2, target_modules=QV
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    tool = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        tool.zero_grad()
        model(torch.tensor(IDS), labels=torch.tensor(IDS)).loss.backward()
        tool.step()
        model.base_model.update_and_allocate(step)
    return model


@pytest.mark.parametrize("scan", [False, True])
def test_a_finished_adalora_is_the_same_function(scan: bool, tiny: World, tmp_path: Path):
    model = pruned(tiny.torch)
    model.save_pretrained(tmp_path / "theirs")
    wanted = run(model)
    left = {name: tensor.shape[0]
            for name, tensor in load_file(tmp_path / "theirs/adapter_model.safetensors").items()
            if "lora_E" in name}  # fmt: skip
    assert sum(left.values()) == 6
    assert {0, 1} < set(left.values())  # some kernels lost all, some more than others
    at = World(tmp_path / "base", tiny.torch, scan_layers=True) if scan else tiny
    adapter = at.load(tmp_path / "theirs")
    assert {site.method for site in adapter.sites} == {
        AdaLoRA(4, alpha=5.0, target_rank=1, total_steps=8, tinit=1, tfinal=2)
    }
    assert sum(int((own["E"] != 0).sum()) for own in adapter.trainable.values()) == 6
    close(at.logits(adapter), wanted)
    assert np.abs(wanted - run(tiny.torch)).max() > 0.01

    for as_lora in (False, True):
        out = tmp_path / f"as_lora={as_lora}"
        save(out, adapter, at.params, names=names_of(at.model), as_lora=as_lora)
        close(run(peft.PeftModel.from_pretrained(copy.deepcopy(tiny.torch), out)), wanted)


def test_what_adalora_has_pruned_stays_out_where_it_is_trained_on(tiny: World, tmp_path: Path):
    pruned(tiny.torch).save_pretrained(tmp_path)
    adapter = tiny.load(tmp_path)

    def loss(trainable: Any) -> jax.Array:
        return (tiny.logits(adapter.with_trainable(trainable)) ** 2).mean()

    for path, grads in jax.grad(loss)(adapter.trainable).items():
        out = np.asarray(adapter.trainable[path]["E"] == 0)
        assert not np.asarray(grads["A"])[:, out].any()
        assert not np.asarray(grads["B"])[out].any()
        assert not np.asarray(grads["E"])[out].any()
        assert np.asarray(grads["E"])[~out].all()


def test_an_adalora_saved_on_the_way_is_what_peft_reads(tiny: World, tmp_path: Path):
    pruned(tiny.torch, steps=5).save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(tiny.torch), tmp_path)
    close(tiny.ours(tmp_path), run(back))


def test_a_mask_that_does_not_fit_is_named_in_few_words(tiny: World, tmp_path: Path):
    pruned(tiny.torch).save_pretrained(tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    own = json.loads(config.read_text())
    key = next(name for name, mask in own["rank_pattern"].items() if not all(mask))
    for mask, words in (
        ([True] * 4, r"_proj has a tensor \(\d, \d\d\), but rank_pattern leaves 4 of 4 triplets"),
        (
            [True] * 999,
            r"rank_pattern of \S*_proj is \[True, .*, no list of 4 times true or false",
        ),
        ([1, 0, 1, 0], r"rank_pattern of \S*_proj is \[1, 0, 1, 0\], no list of 4 times true or"),
        (7, r"rank_pattern of \S*_proj is 7, no list of 4 times true or false: fetch it again"),
    ):
        masks = own["rank_pattern"] | {key: mask}
        config.write_text(json.dumps({**own, "rank_pattern": masks}))
        refuses(tiny, tmp_path, words)
    config.write_text(json.dumps(own))
    some = {k: v for k, v in load_file(weights).items() if key not in k}
    save_file(some, weights)
    refuses(tiny, tmp_path, f"{re.escape(key)} is missing")
