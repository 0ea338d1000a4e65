"""The command line with other models than a Llama: T5, GPT-2 and encoders."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from lora_mini_jax import linen, models
from lora_mini_jax.cli import main
from lora_mini_jax.commands import adapters
from lora_mini_jax.models import GPT2, GPT2Config
from lora_mini_jax.saved import storage
from tests.encoder_runs import write_encoder
from tests.runs import write_data, write_model
from tests.seq2seq_runs import options, pairs, write_rows
from tests.test_cli import refused

IDS, ANSWER = [[3, 4, 3, 1]], [[0, 4, 5]]
METHOD = "lora-mini:rank=2,a=8,b=8"
WORDS = ["--max-length", "16", "--max-steps", "2", "--samples", "2", "--max-new-tokens", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    options(folder)
    run(folder, "compare", "t5", *WORDS, "--data", folder / "pairs.jsonl", "--valid",
        folder / "pairs.jsonl", "--methods", METHOD, "--seeds", "0",
        "--output-dir", folder / "both")  # fmt: skip
    (folder / "run").symlink_to(folder / "both/lora-mini_rank_2_a_8_b_8-seed0")
    return folder


def run(place, command, model, *words):
    main([command, "--model", str(place / model), *map(str, words)])


@pytest.fixture(scope="module")
def ours(place):
    """What the trained T5 says."""
    model, params = models.load(place / "t5")
    adapter = storage.load(place / "run" / "adapter", params)
    assert any(jnp.abs(own["B"]).max() > 0 for own in adapter.trainable.values())
    apply = jax.jit(linen.adapt(model))
    return np.asarray(apply(params, adapter, jnp.array(IDS), jnp.array(ANSWER)))


def same_as_ours(theirs, ours):
    import torch

    logits = theirs(input_ids=torch.tensor(IDS), decoder_input_ids=torch.tensor(ANSWER)).logits
    np.testing.assert_allclose(logits.detach().numpy(), ours, rtol=1e-4, atol=1e-4)


# T5


def test_a_t5_answers_its_prompts(place, capsys):
    samples = json.loads((place / "run/summary.json").read_text())["samples"]
    capsys.readouterr()
    run(place, "generate", "t5", "--adapter", place / "run/adapter", "--max-new-tokens", "2",
        "--prompt", *(sample["prompt"] for sample in samples))  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [sample["after"] for sample in samples]
    assert len(samples) == 2


def test_a_t5_samples_by_its_seed(place, capsys):
    def said(*how: str) -> str:
        run(place, "generate", "t5", "--max-new-tokens", "8", "--prompt", "say red", *how)
        return capsys.readouterr().out

    assert said("--temperature", "3") == said("--temperature", "3", "--seed", "0")
    assert said("--temperature", "3") != said("--temperature", "3", "--seed", "1")
    assert said("--temperature", "3", "--top-p", "1e-6") == said()
    argv = ["generate", "--model", place / "t5", "--prompt", "say red", "--top-p", "0"]
    assert "top_p=0" in refused(capsys, *argv)


def test_a_merged_t5_is_the_same_in_transformers(place, ours):
    from transformers import AutoModelForSeq2SeqLM

    run(place, "merge", "t5", "--adapter", place / "run/adapter",
        "--output-dir", place / "merged")  # fmt: skip
    same_as_ours(AutoModelForSeq2SeqLM.from_pretrained(place / "merged"), ours)


def test_an_exported_t5_adapter_is_the_same_in_peft(place, ours):
    from peft import AutoPeftModelForSeq2SeqLM

    run(place, "export", "t5", "--adapter", place / "run/adapter", "--output-dir", place / "peft")
    config = json.loads((place / "peft/adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    same_as_ours(AutoPeftModelForSeq2SeqLM.from_pretrained(place / "peft"), ours)


def test_compare_took_a_t5(place):
    (row,) = json.loads((place / "both/summary.json").read_text())["rows"]
    assert row["spec"] == METHOD
    assert row["valid_loss_after"] < row["valid_loss_before"]


def test_a_mistake_with_a_t5_is_one_line(place, capsys):
    argv = ["--model", place / "t5", "--output-dir", place / "none", "--data"]
    said = refused(capsys, "compare", *argv, "none.jsonl", "--methods", "lora:rank=99")
    assert "rank 99 exceeds" in said
    write_rows(place / "text.jsonl", [{"text": row["prompt"]} for row in pairs(3)])
    said = refused(capsys, "finetune", *argv, place / "text.jsonl", "--method", "lora")
    assert "prompt_field and completion_field" in said


# Chats


def test_a_message_goes_through_the_chat_template_and_is_answered_alone(place, capsys):
    folder = write_model(place / "chatty")
    words = ["generate", "chatty", "--max-new-tokens", "6"]
    argv = ["generate", "--model", folder, "--prompt", "red", "--chat"]
    assert "no chat template" in refused(capsys, *argv)
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}"
    answer = "{% if add_generation_prompt %}|{% endif %}"
    (folder / "chat_template.jinja").write_text(template + answer)
    run(place, *words, "--prompt", "red", "--chat")
    said = capsys.readouterr().out
    run(place, *words, "--prompt", "user: red|")  # which bos comes before
    assert capsys.readouterr().out == "user: red|" + said
    assert "--chat is for decoders" in refused(
        capsys, "generate", "--model", place / "t5", "--prompt", "red", "--chat"
    )


ROLES = """{% for tool in tools or [] %}<s>{{ tool.name }}{% endfor %}
{%- for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}
{%- if add_generation_prompt %}|{% endif %}"""


@pytest.fixture(scope="module")
def chatty(place):
    """A model with a chat template that knows tools."""
    folder = write_model(place / "talker")
    (folder / "chat_template.jinja").write_text(ROLES)
    return folder


@pytest.fixture
def echo(monkeypatch):
    """Every model writes its prompt again, two at a time; the seeds that it is given."""
    seeds = []

    def again(model, params, prompts, *, seed, **how):
        assert 1 <= len(prompts) <= 2
        seeds.append(seed)
        return prompts

    monkeypatch.setattr(adapters, "AT_ONCE", 2)
    monkeypatch.setattr(adapters, "generate", again)
    return seeds


def test_a_file_of_chats_is_answered_record_by_record(place, chatty, echo, capsys):
    asked = {"role": "user", "content": "red"}
    talk = [asked, {"role": "assistant", "content": "blue"}, {"role": "user", "content": "grey"}]
    records = [
        {"messages": talk},
        {"messages": [asked], "tools": [{"name": "t"}]},
        {"text": "red"},
        {"prompt": [asked]},
        {"conversations": [{"from": "human", "value": "red"}]},
    ]
    write_rows(place / "chats.jsonl", records)
    run(place, "generate", chatty.name, "--chat", "--prompts", place / "chats.jsonl")
    whole, alone = "user: redassistant: blueuser: grey|", "user: red|"
    written = [whole, f"t{alone}", alone, alone, alone]
    assert capsys.readouterr().out.splitlines() == written
    assert len(set(echo)) == len(echo) == 3
    system = ["--system", "s"]
    run(place, "generate", chatty.name, "--chat", "--prompts", place / "chats.jsonl", *system)
    written = [f"system: s{whole}", f"tsystem: s{alone}", *[f"system: s{alone}"] * 3]
    assert capsys.readouterr().out.splitlines() == written
    run(place, "generate", chatty.name, "--chat", "--prompt", "red", *system)
    assert capsys.readouterr().out.splitlines() == written[-1:]


@pytest.mark.usefixtures("echo")
def test_a_file_of_texts_is_continued_record_by_record(place, chatty, capsys):
    texts = ["say red", "say blue", "say grey"]
    (place / "texts.txt").write_text("\n\n".join(texts))
    write_rows(place / "texts.jsonl", [{"prompt": text, "text": "x"} for text in texts])
    for model, wanted in ((chatty.name, [2 * text for text in texts]), ("t5", texts)):
        for how in (["--prompt", *texts], *(["--prompts", place / f"texts.{ending}"]
                                            for ending in ("txt", "jsonl"))):  # fmt: skip
            run(place, "generate", model, *how)
            assert capsys.readouterr().out.splitlines() == wanted


@pytest.mark.usefixtures("echo")
def test_a_stop_ends_a_text_but_not_its_prompt(place, chatty, capsys):
    run(place, "generate", chatty.name, "--prompt", "one. two; three", "--stop", "four", "; ", "tw")
    assert capsys.readouterr().out == "one. two; threeone. \n"


@pytest.mark.parametrize(
    ("record", "words", "said"),
    [
        ({"q": "red"}, [], "line 2: no field prompt or text (its fields: q)"),
        ({"messages": []}, [], "line 2: no field prompt or text"),
        ({"text": 3}, ["--chat"], "line 2: field 'text' holds 3"),
        ({"q": "red"}, ["--chat"], "no field messages or conversations or prompt or text"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, ["--chat"], "line 2: the last"),
        ({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]},
         ["--chat", "--system", "y"], "line 2: it has a system's message of its own"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": 3}, ["--chat"], "'tools'"),
    ],
)  # fmt: skip
def test_a_record_that_asks_nothing_is_named(place, chatty, capsys, record, words, said):
    write_rows(place / "wrong.jsonl", [{"text": "red"}, record])
    argv = ["generate", "--model", chatty, "--prompts", place / "wrong.jsonl", *words]
    assert said in refused(capsys, *argv)


# Inspect


def report_of(place, model, capsys, *words):
    capsys.readouterr()
    run(place, "inspect", model, "--rank", "2", "--a", "8", "--b", "8", "--json", *words)
    return json.loads(capsys.readouterr().out)


def test_inspect_tells_the_bytes_of_a_saved_adapter(place, capsys):
    report = report_of(place, "t5", capsys, "--batch-size", "1", "--max-length", "8")
    assert len(report["kernels"]) == 4 + 3 + 8 + 3
    assert report["tokens_per_step"] == 2 * 8
    assert 0 < report["step_gflop"] < report["full_step_gflop"]
    file = place / "run/adapter/adapter.safetensors"
    with file.open("rb") as opened:
        header = 8 + int.from_bytes(opened.read(8), "little")
    assert report["adapter_bytes"] == file.stat().st_size - header > 4 * report["trainable"]
    with safe_open(file, "numpy") as tensors:
        assert len(tensors.keys()) == 4 * len(report["kernels"])


def test_inspect_of_the_config_only_counts_no_products(place, capsys, monkeypatch):
    monkeypatch.setattr(
        "lora_mini_jax.commands.inspect.dot_flops", lambda jaxpr: pytest.fail("traced")
    )
    quick = report_of(place, "t5", capsys, "--config-only", "--outer-init", "orthogonal")
    assert quick["trainable"] * 4 == quick["adapter_bytes"]
    assert not any("gflop" in name for name in quick)
    run(place, "inspect", "t5", "--method", "lora-mini-diag", "--rank", "2", "--config-only")
    said = capsys.readouterr().out
    # Its frozen factors, (inputs + outputs) times the rank, are stored with it.
    numbers = sum(2 * (32 + out) for out in [32] * 12 + [48] * 6) + 18 * 2
    assert f"saved adapter     {numbers * 4:,} bytes" in said
    assert "GFLOP" not in said


def test_inspect_shows_an_encoder_without_a_head(place, capsys):
    write_encoder(place / "bert")
    report = report_of(place, "bert", capsys, "--batch-size", "2", "--max-length", "8")
    assert len(report["kernels"]) == 6, "not the pooler"
    assert all(k["path"].startswith("encoder/") for k in report["kernels"])
    # Forward: the layer's kernels, its attention, and the pooler of a row; backward is twice that.
    products = 16 * (4 * 16 * 16 + 2 * 16 * 24) + 2 * 2 * 8 * 8 * 16 + 2 * 16 * 16
    assert report["full_step_gflop"] * 1e9 == pytest.approx(3 * 2 * products)
    assert report["step_gflop"] > 0
    assert report["tokens_per_step"] == 16


# GPT-2


def test_gpt2_is_trained_and_continues(place, capsys):
    write_model(place / "llama")  # for its tokenizer
    model = GPT2(GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=48))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    models.save(place / "gpt2", model, params, tokenizer_from=place / "llama")
    data = write_data(place / "data.jsonl", 16)
    run(place, "finetune", "gpt2", "--data", data, "--prompt-field", "q", "--completion-field", "a",
        "--rank", "2", "--a", "8", "--b", "8", "--max-length", "48", "--max-steps", "2",
        "--samples", "0", "--output-dir", place / "run-gpt2")  # fmt: skip
    summary = json.loads((place / "run-gpt2/summary.json").read_text())
    assert summary["trainable"] == 4 * 2 * 16
    assert summary["valid_loss_after"] < summary["valid_loss_before"]
    capsys.readouterr()
    run(place, "generate", "gpt2", "--adapter", place / "run-gpt2/adapter", "--prompt", "say red",
        "--max-new-tokens", "2")  # fmt: skip
    assert capsys.readouterr().out.startswith("say red")
