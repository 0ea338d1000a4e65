"""PEFT's adapters of encoders, bare ones and ones with heads: the same function there and here."""

import copy
from typing import Any

import jax
import numpy as np
import pytest

from lora_mini_jax import LoRA, UserError, init, linen, merge, models, parameters, select
from lora_mini_jax.peft import load, names_of, save
from tests.cases import randomised
from tests.pytorch import peft, torch, transformers

BASE: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 16, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
V3: dict[str, Any] = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
    "position_buckets": 4, "norm_rel_ebd": "layer_norm",
}  # fmt: skip
IDS = np.array([[1, 5, 7, 2, 9, 30]])


class World:
    """A tiny encoder in torch and here."""

    def __init__(self, folder: Any, name: str):
        torch.manual_seed(0)
        cls = getattr(transformers, name)
        extra = V3 if name.startswith("Deberta") else {}
        self.torch = cls(cls.config_class(**BASE, **extra, initializer_range=0.3)).eval()
        self.torch.save_pretrained(folder)
        self.model, self.params = models.load(folder)
        self.names = names_of(self.model)
        self.targets = linen.targets(self.model, self.params, IDS)

    def ours(self, params: Any) -> Any:
        return jax.tree.leaves(jax.jit(self.model.apply)({"params": params}, IDS))[0]

    def adapted(self, modules: list[str]) -> Any:
        """PEFT's model with an adapter of its own."""
        given = peft.LoraConfig(r=4, target_modules=modules)
        model = peft.get_peft_model(copy.deepcopy(self.torch), given)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn_like(p))
        return model.eval()

    def load(self, folder: Any) -> Any:
        return load(folder, self.params, self.targets, names=self.names)

    def save(self, folder: Any, adapter: Any) -> None:
        save(folder, adapter, self.params, names=self.names)


def run(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS))[0].numpy()


def close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


CASES = {
    "BertModel": ["query", "dense", "word_embeddings"],
    "RobertaModel": ["query", "word_embeddings"],
    "DebertaV2Model": ["query_proj", "dense"],
    "BertForSequenceClassification": ["value", "classifier"],
    "BertForMaskedLM": ["value", "token_type_embeddings"],
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_adapters_come_in_and_go_out(name: str, tmp_path: Any):
    """At a rank above the smaller size of the classifier and of the table of types."""
    at = World(tmp_path / "base", name)
    theirs = at.adapted(CASES[name])
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = run(theirs)
    assert np.abs(wanted - run(at.torch)).max() > 0.01
    adapter = at.load(tmp_path / "theirs")
    close(at.ours(merge(at.params, adapter)), wanted)
    at.save(tmp_path / "ours", adapter)
    close(run(peft.PeftModel.from_pretrained(at.torch, tmp_path / "ours")), wanted)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_table_whose_module_is_never_called_is_trained_whole_or_not_at_all(tmp_path: Any):
    at = World(tmp_path / "base", "DebertaV2ForSequenceClassification")
    beside = at.adapted(["rel_embeddings"])
    close(run(beside), run(at.torch))  # PEFT's adapter there does nothing
    beside.save_pretrained(tmp_path / "beside")
    words = r"encoder/rel_embeddings/embedding is read without a call of its module"
    with pytest.raises(UserError, match=words):
        at.load(tmp_path / "beside")
    with pytest.raises(UserError, match=words):
        at.save(tmp_path / "out", init(at.params, LoRA(2), select(at.targets, "rel_embeddings")))

    whole = select(parameters(at.params, at.targets), "rel_embeddings")
    chosen = select(at.targets, "query_proj")
    adapter = randomised(init(at.params, LoRA(2), chosen, modules_to_save=whole))
    at.save(tmp_path / "whole", adapter)
    wanted = at.ours(merge(at.params, adapter))
    close(run(peft.PeftModel.from_pretrained(at.torch, tmp_path / "whole")), wanted)
    close(at.ours(merge(at.params, at.load(tmp_path / "whole"))), wanted)


def test_the_table_of_words_that_is_the_head_too_is_refused(tmp_path: Any):
    at = World(tmp_path / "base", "BertForMaskedLM")
    with pytest.raises(UserError, match="word_embeddings/embedding may be the output head too"):
        at.save(tmp_path / "out", init(at.params, LoRA(2), select(at.targets, "word_embeddings")))
