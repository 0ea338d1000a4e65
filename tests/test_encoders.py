"""The encoders equal transformers' torch models under every head, and read other heads' files."""

import json
import shutil
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_mini_jax import LoRAMini, init, linen, merge, parameters, select
from lora_mini_jax.errors import UserError
from lora_mini_jax.methods import DoRA
from lora_mini_jax.models import load, save
from lora_mini_jax.models.bert import BertConfig
from lora_mini_jax.models.deberta import buckets
from lora_mini_jax.models.families import family_of
from lora_mini_jax.models.hub import load_config
from lora_mini_jax.models.tasks import with_head
from lora_mini_jax.tree import flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 53, "hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 3, "max_position_embeddings": 16, "type_vocab_size": 2,
}  # fmt: skip
V3: dict[str, Any] = {
    "relative_attention": True, "pos_att_type": "p2c|c2p", "share_att_key": True,
    "position_buckets": 4, "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    "type_vocab_size": 0, "max_relative_positions": 9,
}  # fmt: skip
NAMES = {"id2label": {0: "no", 1: "yes", 2: "so"}, "label2id": {"no": 0, "yes": 1, "so": 2}}
CASES: dict[str, dict[str, Any]] = {
    "BertModel": {"num_attention_heads": 4},
    "BertForSequenceClassification": NAMES | {"hidden_act": "gelu_new"},
    "BertForTokenClassification": NAMES | {"num_attention_heads": 1, "hidden_act": "relu"},
    "BertForMaskedLM": {"layer_norm_eps": 1e-3, "intermediate_size": 36},
    "RobertaModel": {},
    "RobertaForSequenceClassification": {"num_labels": 1, "problem_type": "regression"},
    "RobertaForTokenClassification": NAMES,
    "RobertaForMaskedLM": {"hidden_act": "relu", "type_vocab_size": 1},
    "XLMRobertaForSequenceClassification": NAMES | {"pad_token_id": 2},
    "DebertaV2Model": V3,
    "DebertaV2ForSequenceClassification": V3 | NAMES | {
        "position_buckets": -1, "pos_att_type": ["c2p"], "share_att_key": False,
        "position_biased_input": True, "type_vocab_size": 2},
    "DebertaV2ForTokenClassification": V3 | NAMES | {
        "pos_att_type": ["p2c"], "share_att_key": False, "norm_rel_ebd": "none"},
    "DebertaV2ForMaskedLM": V3 | {
        "position_buckets": -1, "max_relative_positions": -1, "intermediate_size": 36},
}  # fmt: skip
AUTO = {
    "Model": "AutoModel", "SequenceClassification": "AutoModelForSequenceClassification",
    "TokenClassification": "AutoModelForTokenClassification", "MaskedLM": "AutoModelForMaskedLM",
}  # fmt: skip


def torch_model(name, changes):
    """A random torch model none of whose parameters is trivial."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    hf = cls(cls.config_class(**BASE | changes))
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return hf.eval()


def inputs_of(config):
    """Tokens, mask and types: a full row, one padded at its end, one at its start."""
    rng, shape = np.random.default_rng(0), (3, 11)
    ids, mask = rng.integers(4, 53, shape), np.ones(shape, int)
    mask[1, 8:] = mask[2, :4] = 0
    ids = np.where(mask, ids, config.pad_token_id)
    types = rng.integers(0, max(1, config.type_vocab_size), shape)
    return ids, mask, types


def torch_outputs(hf, *inputs):
    """The first output, and the second where it is a pooled state; as a list."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        out = hf(**{n: torch.tensor(x) for n, x in zip(names, inputs, strict=False)})
    return [x.numpy() for x in out.to_tuple() if x is not None]


def run(model, params, *inputs):
    """One compiled call; its outputs as a list."""
    out = jax.jit(model.apply)({"params": params}, *map(jnp.asarray, inputs))
    return jax.tree.leaves(out)


def close(got, wanted):
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == jnp.float32
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def oracles(tmp_path_factory):
    """``oracles(name)``: the folder of a torch model, its inputs and outputs, and the model and
    parameters read from there; each is made once."""
    root, made = tmp_path_factory.mktemp("encoders"), {}

    def get(name):
        if name not in made:
            hf = torch_model(name, CASES[name])
            hf.save_pretrained(root / name)
            inputs = inputs_of(hf.config)
            wanted, (model, params) = torch_outputs(hf, *inputs), load(root / name)
            made[name] = SimpleNamespace(folder=root / name, hf=hf, inputs=inputs, wanted=wanted,
                                         model=model, params=params)  # fmt: skip
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_saved_folders_equal_transformers(oracles, name, tmp_path):
    own = oracles(name)
    close(run(own.model, own.params, *own.inputs), own.wanted)
    assert own.model.drawn == ()
    save(tmp_path / "copy", own.model, own.params)
    auto = getattr(transformers, AUTO[name.split("For")[-1] if "For" in name else "Model"])
    again, info = auto.from_pretrained(tmp_path / "copy", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for a, b in zip(torch_outputs(again.eval(), *own.inputs), own.wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert load_config(tmp_path / "copy") == own.model.config
    if "id2label" in CASES[name]:
        assert own.model.config.labels == ("no", "yes", "so")
        assert again.config.id2label == NAMES["id2label"]
        assert again.config.label2id == NAMES["label2id"]


@pytest.mark.parametrize("name", ["BertForTokenClassification", "DebertaV2Model"])
def test_scanned_layers_and_remat_change_nothing(oracles, name, tmp_path):
    own = oracles(name)
    model, params = load(own.folder, scan_layers=True, remat="full")
    kernel = params["encoder"]["layer"]["intermediate"]["dense"]["kernel"]
    assert kernel.shape == (2, 36, 40)
    close(run(model, params, *own.inputs), own.wanted)
    save(tmp_path / "copy", model, params)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "copy")[1], own.params)


def test_half_precision_keeps_float32_outputs(oracles):
    own = oracles("DebertaV2Model")
    model, params = load(own.folder, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, scan_layers=True)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    (got,) = run(model, params, *own.inputs)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, own.wanted[0], atol=0.1)


def test_mask_and_types_have_defaults(oracles):
    own = oracles("BertModel")
    close(run(own.model, own.params, own.inputs[0]), torch_outputs(own.hf, own.inputs[0]))


def test_positions_can_be_given(oracles):
    own = oracles("RobertaModel")
    at = np.broadcast_to(np.arange(11)[::-1], (3, 11)).copy()
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    given = dict(zip(names, (*own.inputs, at), strict=True))
    with torch.no_grad():
        wanted = own.hf(**{n: torch.tensor(x) for n, x in given.items()}).to_tuple()
    close(run(own.model, own.params, *given.values()), [x.numpy() for x in wanted])


@pytest.mark.parametrize(("count", "longest"), [(256, 512), (4, 9), (6, 64), (32, 128)])
def test_buckets_equal_transformers(count, longest):
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    at = np.arange(-700, 700)
    wanted = make_log_bucket_position(torch.tensor(at), count, longest).long().numpy()
    np.testing.assert_array_equal(buckets(at, count, longest), wanted)


def test_too_many_tokens_are_refused(oracles):
    long = jnp.ones((1, 17), jnp.int32)
    for name, most in (("BertModel", 16), ("RobertaModel", 14)):
        own = oracles(name)
        with pytest.raises(UserError, match=f"17 tokens are too many for a model of {most}"):
            jax.eval_shape(own.model.apply, {"params": own.params}, long)


def old_names(folder, to):
    """The same model as files once were: no ``bert.``, ``gamma`` and ``beta``."""
    shutil.copytree(folder, to)
    swap = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        for new, old in swap.items():
            name = name.replace(new, old)
        tensors[name.removeprefix("bert.")] = value
    save_file(tensors, to / "model.safetensors")
    return to


def trunk(params):
    return {name: params[name] for name in ("embeddings", "encoder")}


def test_old_names_are_read(oracles, tmp_path):
    own = oracles("BertForMaskedLM")
    old = old_names(own.folder, tmp_path / "old")
    jax.tree.map(np.testing.assert_array_equal, load(old)[1], own.params)


CLASSIFIER = ("classifier/bias", "classifier/kernel")
POOLER = ("pooler/dense/bias", "pooler/dense/kernel")
FRESH = {
    "another head": ("BertForMaskedLM", "sequence-classification", (*CLASSIFIER, *POOLER)),
    "the bare model": ("BertModel", "sequence-classification", CLASSIFIER),
    "another task's classifier": ("BertForSequenceClassification", "token-classification",
                                  CLASSIFIER),
    "a head of several layers": ("RobertaForTokenClassification", "regression", (
        "classifier/dense/bias", "classifier/dense/kernel", "classifier/out_proj/bias",
        "classifier/out_proj/kernel")),
    "words": ("DebertaV2ForSequenceClassification", "masked-lm", (
        "cls/predictions/bias", "cls/predictions/transform/LayerNorm/bias",
        "cls/predictions/transform/LayerNorm/scale", "cls/predictions/transform/dense/bias",
        "cls/predictions/transform/dense/kernel")),
    "nothing": ("RobertaForMaskedLM", "masked-lm", ()),
}  # fmt: skip


@pytest.mark.parametrize("case", FRESH, ids=lambda name: name.replace(" ", "-"))
def test_what_a_head_lacks_is_drawn(oracles, case):
    name, task, drawn = FRESH[case]
    own = oracles(name)
    model, params = load(own.folder, task=task)
    assert tuple(sorted(model.drawn)) == drawn
    assert model.config.is_regression == (task == "regression")
    jax.tree.map(np.testing.assert_array_equal, trunk(params), trunk(own.params))
    flat = flatten(params)
    for path in drawn:
        if path.endswith("kernel"):
            np.testing.assert_allclose(jnp.std(flat[path]), 0.02, rtol=0.25)
        elif path.endswith("bias"):
            assert not flat[path].any()
    if case == "the bare model":
        jax.tree.map(np.testing.assert_array_equal, params["pooler"], own.params["pooler"])


def test_a_drawn_head_has_the_labels_and_the_seed_asked_for(oracles, tmp_path):
    folder = oracles("BertForSequenceClassification").folder
    task = "sequence-classification"
    model, params = load(folder, task=task, labels=["a", "b", "c", "d"], seed=3)
    assert model.drawn
    kernel = params["classifier"]["kernel"]
    assert kernel.shape == (36, 4)
    again = load(folder, task=task, num_labels=4, seed=3, scan_layers=True)[1]
    np.testing.assert_array_equal(again["classifier"]["kernel"], kernel)
    other = load(folder, task=task, num_labels=4, seed=4)[1]
    assert not np.allclose(other["classifier"]["kernel"], kernel)
    save(tmp_path / "new", model, params)
    hf = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "new")
    assert hf.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}
    assert load(tmp_path / "new", task=task)[0].drawn == ()


def test_a_pretraining_file_gives_its_words_and_its_pooler(tmp_path):
    hf = torch_model("BertForPreTraining", {})
    hf.save_pretrained(tmp_path)
    inputs = inputs_of(hf.config)
    model, params = load(tmp_path, task="masked-lm")
    assert model.drawn == ()
    close(run(model, params, *inputs), torch_outputs(hf, *inputs)[:1])
    model, params = load(tmp_path, task="sequence-classification")
    assert set(model.drawn) == set(CLASSIFIER)
    pooler = hf.bert.pooler.dense.weight.detach().numpy().T
    np.testing.assert_array_equal(params["pooler"]["dense"]["kernel"], pooler)
    with pytest.raises(UserError, match="'BertForPreTraining' is not supported"):
        load(tmp_path)


@pytest.mark.parametrize(("name", "task", "method"), [
    ("BertForMaskedLM", "regression", LoRAMini(rank=2, a=3, b=3)),
    ("DebertaV2ForMaskedLM", None, DoRA(rank=2)),
])  # fmt: skip
def test_adapted_encoders_equal_merged_ones(oracles, name, task, method):
    """All kernels but the head's, which is trained whole where it was drawn."""
    own = oracles(name)
    model, params = load(own.folder, task=task, scan_layers=True)
    inputs = tuple(map(jnp.asarray, own.inputs))
    every = linen.targets(model, params, *inputs)
    drawn = [t for t in parameters(params, every) if t.path in model.drawn and "pool" not in t.path]
    assert {t.path for t in drawn} == (set(CLASSIFIER) if task else set())
    adapter = init(params, method, select(every), modules_to_save=drawn)
    adapter = adapter.with_trainable(jax.tree.map(lambda x: x + 0.1, adapter.trainable))
    got = jax.jit(linen.adapt(model))(params, adapter, *inputs)
    apply = jax.jit(model.apply)
    close([got], [apply({"params": merge(params, adapter)}, *inputs)])
    assert not np.allclose(got, apply({"params": params}, *inputs), atol=1e-2)


@pytest.mark.parametrize("name", ["BertForSequenceClassification",
                                  "DebertaV2ForSequenceClassification"])  # fmt: skip
def test_all_linear_takes_what_peft_takes(oracles, name):
    peft = pytest.importorskip("peft")
    own = oracles(name)
    every = linen.targets(own.model, own.params, *map(jnp.asarray, own.inputs))
    kernels = select(every)
    left = [t.path for t in every if t.kind == "linear" and t not in kernels]
    assert left == ["classifier/kernel"]
    config = peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    adapted = peft.get_peft_model(type(own.hf)(own.hf.config), config)
    theirs = {n for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    names = family_of(own.model.config.to_hf()).names
    ours = {n for t in kernels for n in names(t.path, layers=2)}
    assert {f"base_model.model.{n.removesuffix('.weight')}" for n in ours} == theirs


BROKEN: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "heads": ("BertModel", {"num_attention_heads": 5}, ["hidden_size=36", "heads=5"]),
    "values": ("BertModel", {"vocab_size": "big", "layer_norm_eps": 0, "type_vocab_size": 0},
               ["vocab_size='big'", "layer_norm_eps=0", "type_vocab_size=0"]),
    "keys": ("BertModel", {"hidden_size": None, "vocab_size": None}, ["vocab_size, hidden_size"]),
    "activation": ("BertModel", {"hidden_act": "mish"}, ["'mish'", "'gelu'"]),
    "decoder": ("RobertaModel", {"is_decoder": True}, ["is_decoder True"]),
    "positions": ("BertModel", {"position_embedding_type": "relative_key"}, ["'relative_key'"]),
    "architecture": ("BertModel", {"architectures": ["BertForQuestionAnswering"]},
                     ["'BertForQuestionAnswering'", "BertForMaskedLM"]),
    "labels": ("BertForTokenClassification", {"id2label": {"1": "x"}}, ["id2label"]),
    "same labels": ("BertForTokenClassification", {"id2label": {"0": "x", "1": "x", "2": "y"}},
                    ["distinct"]),
    "kinds": ("BertModel", {"hidden_act": [], "pad_token_id": "0"},
              ["hidden_act []", "pad_token_id"]),
    "problem": ("BertForSequenceClassification", {"problem_type": "odd"}, ["problem_type 'odd'"]),
    "untied": ("BertForMaskedLM", {"tie_word_embeddings": False}, ["tie_word_embeddings"]),
    "missing": ("BertModel", {"architectures": ["BertForMaskedLM"]},
                ["missing cls.predictions.bias"]),
    "sizes": ("BertModel", {"intermediate_size": 41}, ["is (40, 36), not (41, 36)"]),
    "convolution": ("DebertaV2Model", {"conv_kernel_size": 3}, ["conv_kernel_size 3"]),
    "absolute": ("DebertaV2Model", {"relative_attention": False}, ["relative_attention"]),
    "factored": ("DebertaV2Model", {"embedding_size": 8}, ["embedding_size 8"]),
    "wide heads": ("DebertaV2Model", {"attention_head_size": 64}, ["attention_head_size 64"]),
    "products": ("DebertaV2Model", {"pos_att_type": "p2p"}, ["'p2p'", "'c2p', 'p2c'"]),
    "other products": ("DebertaV2Model", {"pos_att_type": [["c2p"]], "share_att_key": 2},
                       ["pos_att_type ['c2p']", "share_att_key=2"]),
    "buckets": ("DebertaV2Model", {"position_buckets": 32}, ["position_buckets=32"]),
    "norm": ("DebertaV2Model", {"norm_rel_ebd": "rms"}, ["norm_rel_ebd 'rms'"]),
    "new words": ("DebertaV2Model", {"legacy": False}, ["legacy"]),
    "no width": ("DebertaV2Model", {"hidden_size": float("nan")}, ["hidden_size nan"]),
    "size and heads": ("BertModel", {"vocab_size": 0, "num_attention_heads": 7},
                       ["vocab_size=0", "not a multiple of num_attention_heads=7"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN, ids=lambda name: name.replace(" ", "-"))
def test_a_broken_config_is_one_clear_line(oracles, case, tmp_path):
    name, changes, words = BROKEN[case]
    folder = shutil.copytree(oracles(name).folder, tmp_path / "model")
    hf = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(hf))
    with pytest.raises(UserError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "task": ({"task": "translation"}, "'translation': choose one of sequence-classification"),
    "no task": ({"labels": ["a"]}, "give task too"),
    "labels of words": ({"task": "masked-lm", "num_labels": 3}, "masked-lm has no labels"),
    "both": ({"task": "regression", "num_labels": 2, "labels": ["a"]}, "there are 1 labels"),
    "none": ({"task": "token-classification", "num_labels": 0}, "a whole number from 1"),
    "a word": ({"task": "token-classification", "labels": "ab"}, "a list of names"),
    "twice": ({"task": "token-classification", "labels": ["a", "a"]}, "distinct names"),
}


@pytest.mark.parametrize("case", ASKED, ids=lambda name: name.replace(" ", "-"))
def test_a_head_that_cannot_be_is_one_clear_line(oracles, case):
    kwargs, words = ASKED[case]
    with pytest.raises(UserError, match=words) as error:
        load(oracles("BertModel").folder, **kwargs)
    assert "\n" not in str(error.value)


def test_what_is_damaged_in_the_encoder_is_not_drawn(oracles, tmp_path):
    folder = shutil.copytree(oracles("BertModel").folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.bias"]
    tensors["encoder.layer.2.output.dense.bias"] = np.ones(36, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        load(folder, task="token-classification")
    assert "missing bert.encoder.layer.1.output.dense.bias" in str(error.value)
    assert "extra bert.encoder.layer.2.output.dense.bias" in str(error.value)


def test_a_family_with_one_head_takes_no_task(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UserError, match="has but one head"):
        load(tmp_path, task="token-classification")


def test_a_regression_says_so_and_a_classifier_no_longer_does():
    bert = {"model_type": "bert", **BASE}
    two = BertConfig.from_hf(with_head(bert, "Bert", "regression", 2))
    assert (two.is_regression, two.problem_type, len(two.labels)) == (True, "regression", 2)
    one = BertConfig.from_hf(with_head(two.to_hf(), "Bert", "regression"))
    assert (one.is_regression, one.labels) == (True, ("LABEL_0",))
    back = BertConfig.from_hf(with_head(two.to_hf(), "Bert", "sequence-classification"))
    assert (back.is_regression, back.problem_type, len(back.labels)) == (False, None, 2)


def test_a_config_without_architectures_is_the_bare_model():
    config = BertConfig.from_hf({"model_type": "bert", **BASE, "num_labels": 3})
    assert (config.task, config.labels) == (None, ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert config == BertConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    assert hash(config) == hash(BertConfig.from_hf(config.to_hf()))
