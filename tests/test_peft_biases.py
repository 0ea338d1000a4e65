"""PEFT's ``bias``: the biases of adapted modules or of the whole model, trained there, read here,
and written again, on real PEFT's side and on ours."""

import copy
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_mini_jax import LoRA, UserError, init, linen, merge, models, parameters, select
from lora_mini_jax.methods import Full, LoRAMini, VeRA
from lora_mini_jax.peft import load, names_of, save
from tests.cases import randomised
from tests.pytorch import peft, torch, transformers

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 16, "initializer_range": 0.3,
    "pad_token_id": 0,
}  # fmt: skip
NAMES = {
    "qwen2": "Qwen2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForSequenceClassification",
    "mlm": "BertForMaskedLM",
}
MORE: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "bert": {"num_labels": 3},
}
IDS = np.array([[1, 5, 7, 2, 9, 30], [3, 3, 8, 11, 4, 6]])


class World:
    """A tiny model in torch, its biases not zero, and here."""

    def __init__(self, folder: Path, kind: str, **options: Any):
        torch.manual_seed(0)
        cls = getattr(transformers, NAMES[kind])
        self.torch = cls(cls.config_class(**SIZES, **MORE.get(kind, {}))).eval()
        with torch.no_grad():
            for name, p in self.torch.named_parameters():
                if name.endswith("bias"):
                    p.normal_(std=0.3)
        self.torch.save_pretrained(folder)
        self.model, self.params = models.load(folder, **options)
        self.targets = linen.targets(self.model, self.params, IDS)

    def trained(self, name: str, **settings: Any) -> Any:
        """PEFT's model after a few updates of its own."""
        torch.manual_seed(1)
        config = getattr(peft, f"{name}Config")(**settings)
        model = peft.get_peft_model(copy.deepcopy(self.torch), config)
        tool = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(4):
            tool.zero_grad()
            logits = model(torch.tensor(IDS)).logits
            (logits**2).mean().add((logits[..., 0] - 1).mean()).backward()
            tool.step()
        return model

    def ours(self, params: Any) -> Any:
        return jax.tree.leaves(jax.jit(self.model.apply)({"params": params}, IDS))[0]

    def theirs(self, folder: Path) -> np.ndarray:
        return run(peft.PeftModel.from_pretrained(copy.deepcopy(self.torch), folder))

    def load(self, folder: Path) -> Any:
        return load(folder, self.params, self.targets, names=names_of(self.model))

    def save(self, folder: Path, adapter: Any) -> dict[str, Any]:
        save(folder, adapter, self.params, names=names_of(self.model))
        return json.loads((folder / "adapter_config.json").read_text())

    def adapter(self, pattern: str, biases: str, method: Any = None) -> Any:
        whole = select(parameters(self.params, self.targets), biases)
        chosen = select(self.targets, pattern)
        return randomised(
            init(self.params, method or LoRA(2), chosen, modules_to_save=whole), seed=5
        )


def run(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def whole(adapter: Any) -> set[str]:
    return {site.target.path for site in adapter.sites if isinstance(site.method, Full)}


CASES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "qwen2, lora_only": (
        "qwen2", "Lora", {"r": 2, "bias": "lora_only", "target_modules": ["q_proj", "up_proj"]}, 2,
    ),
    "qwen2, all": ("qwen2", "Lora", {"r": 2, "bias": "all", "target_modules": ["up_proj"]}, 6),
    "qwen2, dora": (
        "qwen2", "Lora",
        {"r": 2, "use_dora": True, "bias": "lora_only", "target_modules": ["q_proj", "v_proj"],
         "modules_to_save": ["input_layernorm"]},
        6,
    ),
    "qwen2, miss": (
        "qwen2", "Miss", {"r": 2, "bias": "MiSS_only", "target_modules": ["k_proj"]}, 2,
    ),
    "qwen2, bat": (
        "qwen2", "Miss",
        {"r": 2, "init_weights": "bat", "bias": "all", "target_modules": ["k_proj"]}, 6,
    ),
    "gpt2, lora_only": (
        "gpt2", "Lora",
        {"r": 2, "bias": "lora_only", "target_modules": ["c_attn", "mlp.c_proj"]}, 4,
    ),
    "gpt2, all": ("gpt2", "Lora", {"r": 2, "bias": "all", "target_modules": ["c_attn"]}, 13),
    "gpt2, adalora": (
        "gpt2", "AdaLora",
        {"init_r": 3, "target_r": 2, "total_step": 9, "bias": "lora_only",
         "target_modules": ["c_attn"]},
        2,
    ),
    "gpt2, vera": (
        "gpt2", "Vera", {"r": 3, "bias": "vera_only", "target_modules": ["c_attn"]}, 2,
    ),
    "gpt2, vera, all": ("gpt2", "Vera", {"r": 3, "bias": "all", "target_modules": ["c_fc"]}, 13),
    "bert, lora_only": (
        "bert", "Lora",
        {"r": 2, "bias": "lora_only", "target_modules": ["query", "value"],
         "modules_to_save": ["classifier"]},
        6,
    ),
    "bert, all": (
        "bert", "Lora",
        {"r": 2, "bias": "all", "target_modules": ["query"], "modules_to_save": ["classifier"]},
        20,
    ),
    "mlm, all": ("mlm", "Lora", {"r": 2, "bias": "all", "target_modules": ["query"]}, 20),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_biases_that_peft_trained_come_in_and_go_out(case: str, tmp_path: Path):
    kind, name, settings, number = CASES[case]
    at = World(tmp_path / "base", kind)
    theirs = at.trained(name, **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = run(theirs)
    adapter = at.load(tmp_path / "theirs")
    assert len(whole(adapter)) == number
    assert min(np.abs(adapter.trainable[path]["dense"]).max() for path in whole(adapter)) > 1e-3
    merged = merge(at.params, adapter)
    close(at.ours(merged), wanted)

    without = {**adapter.trainable, **{path: {"dense": 0 * adapter.trainable[path]["dense"]}
                                       for path in whole(adapter)}}  # fmt: skip
    lost = at.ours(merge(at.params, adapter.with_trainable(without)))
    assert np.abs(lost - wanted).max() > 0.01

    written = at.save(tmp_path / "ours", adapter)
    assert written["bias"] == settings["bias"]
    assert written["modules_to_save"] is None or "modules_to_save" in settings
    close(at.theirs(tmp_path / "ours"), wanted)
    close(at.ours(merge(at.params, at.load(tmp_path / "ours"))), wanted)


OURS = {
    "of adapted ones": ("qwen2", "q_proj|up_proj", "q_proj/bias", None, "lora_only"),
    "stacked": ("qwen2", "q_proj|v_proj", "(q|v)_proj/bias", LoRAMini(2, a=6, b=5), "lora_only"),
    "all": ("gpt2", "c_attn", "bias", None, "all"),
    "all that there are": ("qwen2", "(q|k|v)_proj", "bias", None, "lora_only"),
    "VeRA's": ("gpt2", "c_attn", "c_attn/bias", VeRA(3), "vera_only"),
    "a head": ("bert", "query", "classifier|query/bias", None, "lora_only"),
    "norms": ("gpt2", "c_attn", "ln_1|ln_f/bias|c_attn/bias", None, "lora_only"),
    "norms alone": ("gpt2", "c_attn", "ln_1/bias", None, "none"),
}


@pytest.mark.parametrize("case", OURS)
def test_biases_trained_here_go_out_and_come_back(case: str, tmp_path: Path):
    kind, pattern, biases, method, setting = OURS[case]
    at = World(tmp_path / "base", kind, **({"scan_layers": True} if case == "stacked" else {}))
    adapter = at.adapter(pattern, biases, method)
    wanted = at.ours(merge(at.params, adapter))
    assert at.save(tmp_path / "out", adapter)["bias"] == setting
    close(at.theirs(tmp_path / "out"), wanted)
    back = at.load(tmp_path / "out")
    assert whole(adapter) <= whole(back)  # a norm saved whole has a scale too
    close(at.ours(merge(at.params, back)), wanted)


def test_other_biases_are_refused(tmp_path: Path):
    at = World(tmp_path / "base", "gpt2")
    three = (
        "of biases, PEFT trains those of no adapted module, of all of them or of the whole model"
    )
    for biases, message in (
        (
            "h_0/attn/c_attn/bias",
            r"h.0.attn.c_attn.bias would be trained, but not .*h.1.attn.c_attn",
        ),
        (
            "(c_attn|c_fc)/bias",
            r"h_0/mlp/c_fc/kernel is in one of which another .* is trained: add",
        ),
    ):
        with pytest.raises(UserError, match=f"{message}.*{three}") as raised:
            at.save(tmp_path / "out", at.adapter("c_attn", biases))
        assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_that_lost_their_biases_say_so(tmp_path: Path):
    """As PEFT wrote them for years: it looked for a layer's bias where it was no longer."""
    at = World(tmp_path / "base", "qwen2")
    config = {"r": 2, "bias": "lora_only", "target_modules": ["q_proj"]}
    at.trained("Lora", **config).save_pretrained(tmp_path / "theirs")
    file, settings = (
        tmp_path / "theirs" / f"adapter_{name}" for name in ("model.safetensors", "config.json")
    )
    own = load_file(file)
    some = {k: v for k, v in own.items() if not k.endswith("0.self_attn.q_proj.base_layer.bias")}
    save_file(some, file)
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj.bias is missing"):
        at.load(tmp_path / "theirs")
    save_file({k: v for k, v in own.items() if "bias" not in k}, file)
    with pytest.raises(UserError, match=r'has none of the biases .*"bias": "none" into the config'):
        at.load(tmp_path / "theirs")
    written = json.loads(settings.read_text())
    settings.write_text(json.dumps({**written, "bias": "none"}))
    close(at.ours(merge(at.params, at.load(tmp_path / "theirs"))), at.theirs(tmp_path / "theirs"))
    settings.write_text(json.dumps({**written, "bias": ["none"] * 99}))
    with pytest.raises(
        UserError, match=r"bias is .*, neither none nor all nor lora_only"
    ) as raised:
        at.load(tmp_path / "theirs")
    assert len(str(raised.value)) < 250 + len(str(tmp_path))
