"""Sources and targets: rows, the loss they have in transformers, whole runs, what stops them."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_mini_jax import LoRA, UserError, init, linen, merge, select
from lora_mini_jax.adapters.adapter import draw
from lora_mini_jax.data import Fields, load_tokenizer
from lora_mini_jax.data.encoded import joined
from lora_mini_jax.data.pair_rows import pair_rows
from lora_mini_jax.data.pairs import pair_stream
from lora_mini_jax.generation.generate import generate
from lora_mini_jax.methods import from_spec
from lora_mini_jax.models import load
from lora_mini_jax.runs.finetune import finetune
from lora_mini_jax.tasks.kinds import planned, prepare
from lora_mini_jax.tasks.seq2seq import Seq2SeqTask
from tests.cases import randomised
from tests.runs import stopped_at
from tests.seq2seq_runs import options, pairs, write_rows

FIELDS = Fields()
SAY, RED, GREEN, END = 3, 4, 5, 1


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("seq2seq")


@pytest.fixture(scope="module")
def finished(place):
    given = options(place, output_dir=str(place / "finished"))
    return given, quiet(given)


def quiet(given):
    return finetune(given, say=lambda line: None)


# Rows


def encoded(place, records, **changes):
    options(place)
    given: dict[str, Any] = {"start_id": 9, "max_length": 6, "source": "some.jsonl", **changes}
    return joined(pair_stream(records, load_tokenizer(place / "t5"), FIELDS, **given))


LONG = [
    {"prompt": "say red say red say red", "completion": "red"},
    {"prompt": "say", "completion": "green " * 6},
    {"prompt": "say green", "completion": "red"},
]


def test_both_sides_end_and_the_decoder_starts_with_its_token(place):
    (pair,), skipped, cut = encoded(place, LONG[2:])
    assert (pair.source.tolist(), pair.target.tolist()) == ([SAY, GREEN, END], [9, RED, END])
    assert (skipped, cut) == (0, 0)


def test_long_pairs_are_skipped_cut_or_an_error(place):
    kept, skipped, cut = encoded(place, LONG)
    assert (len(kept), skipped, cut) == (1, 2, 0)
    (first, second, _), skipped, cut = encoded(place, LONG, overlong="truncate")
    assert (skipped, cut) == (0, 2)
    assert first.source.tolist() == [SAY, RED, SAY, RED, SAY, END], "a source always ends"
    assert second.target.tolist() == [9, *[GREEN] * 5], "nothing ends where it was cut"
    with pytest.raises(UserError, match="7 tokens, more than max_length 6: raise"):
        encoded(place, LONG, overlong="error")
    with pytest.raises(UserError, match="overlong is 'cut': choose one of skip, truncate"):
        encoded(place, LONG, overlong="cut")


def test_rows_are_as_long_as_the_longest_in_steps_of_8(place):
    examples = encoded(place, LONG, max_length=30).examples
    rows = pair_rows(examples, max_length=30, pad_id=2)
    assert rows.source.shape == rows.tokens.shape == (3, 8)
    assert pair_rows(examples * 2, max_length=30).tokens.shape == (6, 8)
    assert rows.source[2].tolist() == [SAY, GREEN, END, *[2] * 5]
    assert rows.source_mask.sum(1).tolist() == [7, 2, 3]
    assert rows.segment_ids.sum(1).tolist() == [3, 8, 3]
    assert (rows.loss_mask.sum(1) == rows.segment_ids.sum(1) - 1).all()
    assert not rows.loss_mask[:, 0].any()
    short = encoded(place, LONG, max_length=7).examples
    assert pair_rows(short, max_length=7).source.shape == (2, 7)


# The loss


def test_the_loss_and_what_is_right_are_those_of_transformers(place):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    task = prepare(options(place))
    assert isinstance(task, Seq2SeqTask)
    adapter = draw(task.params, task.sites, 0)  # the identity at the start
    batches = list(task.valid.eval_batches())
    assert len(batches[-1]["tokens"]) == 8, "filled up with padding"
    score = jax.jit(task.score)
    found = task.measures([score(task.params, adapter, batch) for batch in batches])

    hf = transformers.T5ForConditionalGeneration.from_pretrained(place / "t5").eval()
    words = load_tokenizer(place / "t5")
    total = right = count = 0
    for record in pairs(27):
        source = torch.tensor([[*words.encode(record["prompt"]), END]])
        labels = torch.tensor([[*words.encode(record["completion"]), END]])
        with torch.no_grad():
            out = hf(input_ids=source, labels=labels)
        total += float(out.loss) * labels.numel()
        right += bool((out.logits.argmax(-1) == labels).all())
        count += labels.numel()
    assert found["valid_loss"] == pytest.approx(total / count, rel=1e-4)
    assert found["valid_right"] == pytest.approx(right / 27)


# Runs


def test_the_rule_is_learned_and_the_samples_show_it(finished):
    _, summary = finished
    assert summary["valid_loss_after"] < 0.2 < 2 < summary["valid_loss_before"]
    assert summary["valid_right_after"] == 1
    assert len(summary["samples"]) == 2
    for sample in summary["samples"]:
        assert sample["after"] == sample["prompt"].split()[1] != sample["before"]


def test_a_stopped_run_goes_on_and_ends_the_same(finished, place):
    given = dataclasses.replace(finished[0], output_dir=str(place / "stopped"), samples=0)
    with stopped_at(25), pytest.raises(KeyboardInterrupt):
        quiet(given)
    quiet(given)
    ours, whole = (place / f / "adapter/adapter.safetensors" for f in ("stopped", "finished"))
    assert ours.read_bytes() == whole.read_bytes()


def test_what_was_skipped_is_said(place):
    write_rows(place / "long.jsonl", [*pairs(9), {"prompt": "say " * 12, "completion": "red"}])
    task = prepare(options(place, data=str(place / "long.jsonl")))
    assert len(task.notes) == 1
    assert task.notes[0].startswith("1 training examples were skipped: longer than 12 tokens")


WRONG: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "text": ([{"text": "say red"}], {}, r"learns from pairs .*\(fields: text\).*prompt_field"),
    "chats": ([{"messages": [{"role": "user", "content": "red"}]}], {}, "learns from pairs"),
    "labels": ([{"sentence": "red", "label": 1}], {}, r"\(fields: sentence, label\)"),
    "a field": ([{"prompt": "red", "completion": "red"}], {"text_field": "prompt"}, "pairs"),
    "no field": (pairs(3), {"prompt_field": "q", "completion_field": "a"}, "no field 'q'"),
    "too long": ([{"prompt": "red " * 20, "completion": "red"}] * 3, {}, "none of 3 records"),
    "separator": (pairs(3), {"separator": " "}, "--separator ' '.*leave it out"),
    "a task": (pairs(3), {"task": "classification", "text_fields": ("prompt",),
                          "label_field": "completion", "max_new_tokens": 48},
               "holds a T5, which has no head"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line(place, case):
    records, changes, said = WRONG[case]
    data = str(write_rows(place / f"{case}.jsonl", records))
    with pytest.raises(UserError, match=said) as error:
        prepare(options(place, data=data, **{"valid": data} | changes))
    assert "\n" not in str(error.value)


def test_a_plan_needs_no_data(place):
    sites = planned(options(place, data="nowhere", target_modules=("EncDecAttention",)))
    assert {site.target.path.split("/")[-2] for site in sites} == {"q", "k", "v", "o"}


# Calls that use a part of the adapter


class Halves(nn.Module):
    """Two layers, of which a call may leave the first out."""

    @nn.compact
    def __call__(self, x, both=True):
        first, second = nn.Dense(4, name="first"), nn.Dense(4, name="second")
        return second(first(x) if both else x)


def test_a_call_of_a_part_is_allowed_where_it_is_said_and_keeps_kernels_related():
    model, x = Halves(), jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    # The gates of a layer compete, so the second kernel's update depends on the first one's gate.
    method = from_spec("diffora:inner=lora(rank=2),relaxation=softmax")
    adapter = randomised(init(params, method, linen.targets(model, params, x)), scale=1.0)
    with pytest.raises(UserError, match=r"used 1 of 2 adapted kernels; never used: .*first/kernel"):
        linen.adapt(model)(params, adapter, x, both=False)
    got = linen.adapt(model, whole=False)(params, adapter, x, both=False)

    def plain(weights):
        return np.asarray(model.apply({"params": weights}, x, both=False))

    np.testing.assert_allclose(got, plain(merge(params, adapter)), rtol=1e-5, atol=1e-5)
    assert np.abs(got - plain(params)).max() > 0.1


def test_a_narrow_base_loses_nothing_of_a_small_update_in_text(place):
    """In bfloat16 the update of the head below is less than the last bit of its kernel."""
    options(place)
    model, params = load(place / "t5", param_dtype=jnp.bfloat16)
    kernel = jnp.full_like(params["lm_head"]["kernel"], 8.0)  # all words are alike
    params["lm_head"]["kernel"] = kernel
    one = jnp.zeros((1, 2), jnp.int32)
    head = select(linen.targets(model, params, one, one), "lm_head")
    adapter = init(params, LoRA(1, alpha=1.0), head)
    factors = {
        "A": jnp.ones((32, 1)),
        "B": jnp.zeros((1, 12)).at[0, 5].set(0.01).at[0, 6].set(-0.01),
    }
    adapter = adapter.with_trainable({"lm_head/kernel": factors})
    assert (merge(params, adapter)["lm_head"]["kernel"] == kernel).all(), "merging loses it"
    sources = [[SAY, RED, END], [SAY, END]]
    written = generate(model, params, sources, adapter=adapter, max_new_tokens=3, eos_id=())
    assert [len(row) for row in written] == [3, 3]
    assert {t for row in written for t in row} <= {5, 6}
