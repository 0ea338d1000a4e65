"""Hugging Face's own Flax classes, adapted as they are, and their weights handed back to them."""

import re
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_mini_jax import (
    LoRA,
    LoRAMini,
    TrainState,
    init,
    linen,
    load,
    make_train_step,
    merge,
    save,
    select,
)
from tests.cases import draws, randomised
from tests.lanes import only_in

only_in("hf_flax")
if not metadata.version("transformers").startswith("4."):
    pytest.skip("transformers 5 has no Flax classes: 4.57.6 is the last", allow_module_level=True)
transformers = pytest.importorskip("transformers")

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text()
METHODS = {"lora-mini": LoRAMini(rank=2, a=6, b=6), "lora": LoRA(rank=2)}
IDS = jnp.array([[5, 3, 8, 2, 9], [7, 6, 6, 4, 3]])
ONES = jnp.ones_like(IDS)
MASK = ONES.at[1, 4].set(0)
HERE = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
VOCAB = 11
ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 20, "max_position_embeddings": 12, "num_labels": 3,
}  # fmt: skip


class Case(NamedTuple):
    """A model of Hugging Face's with random parameters."""

    model: Any
    params: Any
    whole: dict[str, Any]  # of a call of its module
    given: dict[str, Any]  # of a call of the model, which makes the rest itself
    count: int  # of linear kernels that are not the head


def bert(**how: Any) -> Any:
    config = transformers.BertConfig(**ENCODER)
    model = transformers.FlaxBertForSequenceClassification(config, **how)
    given = {"input_ids": IDS, "attention_mask": MASK}
    made = {"token_type_ids": 0 * IDS, "position_ids": HERE, "head_mask": None}
    return model, given, made, 2 * 6 + 1


def roberta(**how: Any) -> Any:
    config = transformers.RobertaConfig(**ENCODER)
    model = transformers.FlaxRobertaForSequenceClassification(config, **how)
    model.enable_gradient_checkpointing()
    given = {"input_ids": IDS, "attention_mask": MASK}
    made = {"token_type_ids": 0 * IDS, "position_ids": HERE + 2, "head_mask": None}
    return model, given, made, 2 * 6


def gpt2(**how: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=8, n_embd=12, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.FlaxGPT2LMHeadModel(config, **how)
    return model, {"input_ids": IDS, "attention_mask": MASK}, {"position_ids": HERE}, 2 * 4


def llama(**how: Any) -> Any:
    config = transformers.LlamaConfig(  # its positions must be as many as a head is wide, twice
        vocab_size=VOCAB, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=12,
    )  # fmt: skip
    model = transformers.FlaxLlamaForCausalLM(config, **how)
    return model, {"input_ids": IDS, "attention_mask": MASK}, {"position_ids": HERE}, 2 * 7


def t5(**how: Any) -> Any:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=12, d_kv=6, d_ff=20, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.FlaxT5ForConditionalGeneration(config, **how)
    model.enable_gradient_checkpointing()
    given = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, ::-1]}
    return model, given, {"decoder_attention_mask": ONES}, 2 * 6 + 2 * 10


@pytest.fixture(scope="module", autouse=True)
def _clip_as_it_was() -> Any:
    """T5's class calls ``jnp.clip`` with a keyword that JAX has renamed since."""
    clip = jnp.clip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, "clip", lambda x, *given, **kw: clip(
            x, *given, **{{"a_min": "min", "a_max": "max"}.get(k, k): v for k, v in kw.items()}
        ))  # fmt: skip
        yield


@pytest.fixture(scope="module", params=[bert, roberta, gpt2, llama, t5])
def case(request: Any) -> Case:
    model, given, made, count = request.param(_do_init=False)
    return Case(model, draws(model.params_shape_tree), {**given, **made}, given, count)


@pytest.fixture(scope="module")
def plain(case: Case) -> Any:
    """The model's own call, compiled: ``plain(params)``, its logits."""
    return jax.jit(lambda params: case.model(**case.given, params=params).logits)


def chosen(case: Case) -> Any:
    return select(linen.targets(case.model.module, case.params, **case.whole))


def differ(a: Any, b: Any) -> list[bool]:
    """Leaf by leaf."""
    return jax.tree.leaves(jax.tree.map(lambda x, y: bool((np.asarray(x) != y).any()), a, b))


def test_the_default_choice_is_every_linear_kernel_but_the_head(case: Case) -> None:
    targets = chosen(case)
    assert len(targets) == case.count
    assert {t.kind for t in targets} == {"linear"}
    for target in targets:
        if "c_attn" in target.path:  # GPT-2 keeps (out, in)
            assert (target.shape, target.n_in, target.n_out) == ((36, 12), 12, 36)


@pytest.mark.parametrize("name", METHODS)
def test_adapted_call_equals_the_models_own_on_merged_weights(
    case: Case, plain: Any, name: str
) -> None:
    adapter = randomised(init(case.params, METHODS[name], chosen(case)))
    apply = linen.adapt(case.model.module)
    y = jax.jit(lambda params, adapter: apply(params, adapter, **case.whole).logits)(
        case.params, adapter
    )
    np.testing.assert_allclose(y, plain(merge(case.params, adapter)), rtol=1e-5, atol=1e-5)
    assert jnp.abs(y - plain(case.params)).max() > 0.01


@pytest.mark.parametrize("name", METHODS)
def test_training_changes_the_adapter_alone_and_both_are_saved(
    case: Case, plain: Any, name: str, tmp_path: Path
) -> None:
    apply = linen.adapt(case.model.module)

    def cross_entropy(logits: jax.Array) -> jax.Array:
        labels = IDS[:, : logits.shape[1]] if logits.ndim == 3 else jnp.array([2, 0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def loss(params: Any, adapter: Any, batch: Any, key: Any) -> jax.Array:
        out = apply(params, adapter, **batch, deterministic=False, rngs={"dropout": key})
        return cross_entropy(out.logits)

    tx = optax.adam(2e-2)
    step = make_train_step(loss, tx)
    start = init(case.params, METHODS[name], chosen(case))
    drawn, base = jax.tree.map(np.array, (start, case.params))
    state = TrainState.create(start, tx)
    for _ in range(20):
        state, _ = step(state, case.params, case.whole)

    assert all(differ(state.adapter.trainable, drawn.trainable))
    assert not any(differ((state.adapter.frozen, case.params), (drawn.frozen, base)))
    merged = merge(case.params, state.adapter)
    assert cross_entropy(plain(merged)) < 0.95 * cross_entropy(plain(case.params))

    save(tmp_path / "adapter", state.adapter, case.params)
    jax.tree.map(
        np.testing.assert_array_equal, load(tmp_path / "adapter", case.params), state.adapter
    )
    case.model.save_pretrained(tmp_path / "merged", params=merged)
    read = partial(type(case.model).from_pretrained, tmp_path / "merged", _do_init=False)
    jax.tree.map(np.testing.assert_array_equal, read()[1], merged)


def test_the_example_in_the_docs_runs(tmp_path: Path, monkeypatch: Any) -> None:
    (example,) = re.findall(r"```python hf-flax\n(.*?)```", PAGE, re.S)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example, names)
    model, logits = names["model"], names["logits"]
    again = transformers.FlaxGPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    for written in (model, again):
        np.testing.assert_allclose(written(names["ids"]).logits, logits, rtol=1e-5, atol=1e-5)
