"""Pre-training: the four methods from one door, resuming, full rank exactly, the bill by hand."""

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_mini_jax import UserError, linen
from lora_mini_jax.adapters.adapter import draw
from lora_mini_jax.cli import main, parse
from lora_mini_jax.data import (
    encode_texts,
    find_texts,
    hold_out,
    load_tokenizer,
    thinned,
    token_loss,
)
from lora_mini_jax.models import Llama, load
from lora_mini_jax.options import Pretrain, to_json
from lora_mini_jax.runs.folder import RunFolder
from lora_mini_jax.runs.meter import Meter
from lora_mini_jax.runs.pretrain import pretrain
from lora_mini_jax.runs.schedule import learning_rate
from lora_mini_jax.runs.scratch import begin, prepare
from lora_mini_jax.tree import flatten
from tests.runs import WORDS, write_model
from tests.test_cli import refused

SETTINGS = {
    "full": (),
    "lora": ("rank=4",),
    "relora": ("rank=4", "reset_every=3"),
    "switchlora": ("rank=4", "interval0=2", "ratio=1.0", "freeze_steps=2"),
}
KERNELS = [(32, 32)] * 4 + [(32, 48)] * 2 + [(48, 32)]
"""What `tests.runs.write_model` has in its one layer."""
WHOLE = 2 * 259 * 32 + 3 * 32
"""Its embedding, head and norms."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    write_model(folder / "model")
    for i in range(12):
        file = folder / "texts" / f"part{i % 3}" / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{WORDS[(i + j) % 8]} and {WORDS[j % 8]}\n" for j in range(9)))
    return folder


def options(place, method="full", **changes):
    given: dict[str, Any] = {
        "method": method,
        "settings": SETTINGS[method],
        "data": (str(place / "texts"),),
        "shape": str(place / "model"),
        "tokenizer": str(place / "model"),
        "held_out": 0.2,
        "max_length": 32,
        "batch_size": 4,
        "steps": 8,
        "eval_every": 4,
        "save_every": 2,
        "log_every": 3,
        "output_dir": str(place / method),
    }
    return Pretrain(**{**given, **changes})


def quiet(given):
    return pretrain(given, say=lambda line: None)


@pytest.fixture(scope="module", params=SETTINGS)
def finished(request, place):
    given = options(place, request.param)
    return given, quiet(given)


def test_every_method_learns_and_leaves_what_is_promised(finished):
    given, summary = finished
    folder = RunFolder(given).path
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "data.json", "metrics.jsonl", "checkpoints", "model", "summary.json",
        "report.html", ".lock",
    }  # fmt: skip
    assert summary["valid_loss_after"] < summary["valid_loss_before"] - 0.05
    assert list(summary["perplexity"]) == ["0", "4", "8"]
    after = math.exp(summary["valid_loss_after"])
    assert summary["perplexity"]["8"] == pytest.approx(after)
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert "bytes exchanged a step" in page
    assert f"{after:.2f}" in page
    assert quiet(given) == summary, "a finished run is not run again"


def test_a_stopped_run_goes_on_to_the_same_bits(finished, place, monkeypatch):
    whole = finished[0]
    given = options(place, whole.method, output_dir=str(place / f"{whole.method}-stopped"))
    add, steps = Meter.add, []

    def stopping(*args):
        add(*args)
        steps.append(1)
        if len(steps) == 6:  # that of step 4 is the newest checkpoint
            raise KeyboardInterrupt

    monkeypatch.setattr(Meter, "add", stopping)
    with pytest.raises(KeyboardInterrupt):
        quiet(given)
    monkeypatch.setattr(Meter, "add", add)
    summary = quiet(given)
    ours, theirs = (RunFolder(o).model / "model.safetensors" for o in (given, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    assert summary["perplexity"] == finished[1]["perplexity"]


def test_the_written_model_loads_with_the_same_held_out_loss(finished):
    given, summary = finished
    folder = RunFolder(given).model
    model, params = load(folder)
    assert load_tokenizer(folder).encode("red") == load_tokenizer(given.tokenizer).encode("red")
    sums = np.sum([summed(model, params, b) for b in prepare(given).valid.eval_batches()], axis=0)
    assert sums[0] / sums[1] == pytest.approx(summary["valid_loss_after"], rel=1e-5)


def summed(model, params, batch):
    inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
    return token_loss(model.apply({"params": params}, *inputs), batch)


def test_full_rank_is_plain_training_of_the_initial_parameters(place):
    """Weight decay included: it is the weights that it draws to zero."""
    given = options(place, weight_decay=0.1, output_dir=str(place / "decayed"))
    quiet(given)
    task, rate = prepare(given), learning_rate(given, given.steps)
    model = Llama(task.model.config, scan_layers=True)
    params = model.init(jax.random.key(given.seed), jnp.zeros((1, 2), jnp.int32))["params"]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1))
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        def loss(p):
            total, number = summed(model, p, batch)
            return total / number

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    start = params
    for i in range(given.steps):
        params, state = step(params, state, task.train.batch(i))
    written = flatten(load(RunFolder(given).model, scan_layers=True)[1])
    for path, expected in flatten(params).items():
        assert abs(expected - flatten(start)[path]).max() > 1e-3, f"{path} did not move"
        np.testing.assert_allclose(written[path], expected, rtol=1e-5, atol=1e-5, err_msg=path)


def test_beginning_does_not_change_the_function(place):
    task = prepare(options(place, "switchlora"))
    adapter = draw(task.params, task.sites, 0)
    tokens = jnp.asarray(task.train.batch(0)["tokens"])
    plain = np.asarray(task.model.apply({"params": task.params}, tokens))
    begun = np.asarray(linen.adapt(task.model)(*begin(task.params, adapter), tokens))
    np.testing.assert_allclose(begun, plain, atol=1e-5)


def test_the_bill_is_what_counting_by_hand_gives(finished):
    given, summary = finished
    rank = 4
    thin = sum(rank * (n_in + n_out) for n_in, n_out in KERNELS)
    thick = sum(n_in * n_out for n_in, n_out in KERNELS)
    pools = sum((min(kernel) - rank) * sum(kernel) + 2 * rank + 1 for kernel in KERNELS)
    trained = WHOLE + (thick if given.method == "full" else thin)
    carried = {"full": 0, "lora": 0, "relora": thick, "switchlora": thick + pools}
    # Two moments, and a counter for all or, where entries start afresh, one for each of those and
    # one for each other leaf; the schedule counts too.
    others = sum(site.method.name == "full" for site in prepare(given).sites)
    counted = thin + others if given.method in ("relora", "switchlora") else 1
    assert summary["trainable"] == trained
    assert summary["exchanged_bytes"] == 4 * trained
    assert summary["frozen_bytes"] == 4 * carried[given.method]
    assert summary["optimizer_bytes"] == 4 * (2 * trained + counted + 1)
    assert summary["base_bytes"] == 4 * summary["parameters"] == 4 * (WHOLE + thick)
    assert summary["tokens_per_second"] > 0


def test_the_length_of_the_run_is_told_to_a_method_that_has_one(place):
    for given, expected in (((), 50), (("total_steps=70",), 70)):
        settings = (*SETTINGS["switchlora"], *given)
        task = prepare(options(place, "switchlora", steps=50, settings=settings))
        lengths = {site.method.to_dict().get("total_steps") for site in task.sites}
        assert lengths == {None, expected}


def test_a_run_without_a_restart_says_so(place):
    given = {"settings": ("rank=4", "reset_every=50")}
    assert prepare(options(place, "relora", steps=51, **given)).notes == []
    (note,) = prepare(options(place, "relora", steps=50, **given)).notes
    assert note.startswith("no restart within 50 steps")


def test_relora_warms_up_again_after_a_restart(place):
    changes = {"schedule": "constant", "warmup_ratio": 0.5, "learning_rate": 1.0}
    again = learning_rate(options(place, "relora", settings=("reset_every=10",), **changes), 20)
    once = learning_rate(options(place, "lora", **changes), 20)
    rates = [[float(np.asarray(rate(i))) for i in (0, 9, 10, 12, 15)] for rate in (again, once)]
    np.testing.assert_allclose(rates[0], [0.1, 1.0, 0.2, 0.6, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates[1], [0.1, 1.0, 1.0, 1.0, 1.0], rtol=1e-6)


def test_every_token_of_a_file_but_the_first_is_predicted_once(place):
    tokenizer = load_tokenizer(place / "model")
    texts = find_texts([place / "texts"], [".txt"])
    pieces = encode_texts(texts, tokenizer, 7)
    assert max(len(piece.tokens) for piece in pieces) == 7
    whole = [tokenizer.encode(text.path.read_text()) for text in texts]
    predicted = np.concatenate([piece.tokens[piece.loss_mask] for piece in pieces])
    assert predicted.tolist() == [token for ids in whole for token in (*ids, tokenizer.eos_id)]


def test_files_are_held_out_whole_and_by_name(place, tmp_path):
    texts = find_texts([place / "texts"], [".txt"])
    train, valid = hold_out(texts, 0.25)
    assert len(valid) == 3
    assert sorted(train + valid) == texts
    assert hold_out(list(reversed(texts)), 0.25)[1] == valid
    with pytest.raises(UserError, match=r"1 of 1 text files .* --valid"):
        hold_out(texts[:1], 0.25)
    with pytest.raises(UserError, match=r"--held-out 0 holds out no file.* --valid"):
        hold_out(texts, 0.0)
    given = options(place, valid=(str(place / "texts" / "part1"),))
    sizes = [int(b.packed.loss_mask.sum()) for b in (prepare(given).train, prepare(given).valid)]
    tokens = {t.name: len(t.path.read_bytes()) + 1 for t in texts}  # bytes are tokens, and eos
    held_out = sum(n for name, n in tokens.items() if name.startswith("part1/"))
    assert sizes == [sum(tokens.values()) - held_out, held_out]


def test_only_so_many_held_out_tokens_are_evaluated(place):
    texts = find_texts([place / "texts"], [".txt"])
    pieces = encode_texts(texts, load_tokenizer(place / "model"), 16)
    fewer = thinned(pieces, 160)
    assert 130 <= sum(len(piece.tokens) for piece in fewer) <= 160
    assert fewer[0] is pieces[0]
    assert thinned(pieces, None) == thinned(pieces, 10**9) == pieces


def test_a_config_file_is_read_back_and_flags_are_settings(place, tmp_path):
    given = options(place, "switchlora")
    (tmp_path / "config.json").write_text(json.dumps(to_json(given)))
    assert parse(["pretrain", "--config", str(tmp_path / "config.json")]) == given
    flags = parse(["pretrain", "--method", "switchlora", "--rank", "7", "--data", "x"])
    assert flags.adapter_method().rank == 7


def test_sizes_make_the_model(place, tmp_path, capsys):
    argv = ["pretrain", "--data", place / "texts", "--tokenizer", place / "model", "--steps", 1,
            "--hidden-size", 16, "--num-hidden-layers", 2, "--intermediate-size", 24,
            "--num-attention-heads", 4, "--vocab-size", 300, "--output-dir", tmp_path / "run",
            "--held-out", 0.1, "--max-length", 16, "--batch-size", 2]  # fmt: skip
    main([str(word) for word in argv])
    config = load(tmp_path / "run" / "model")[0].config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (16, 2, 300)
    assert (config.head_dim, config.num_key_value_heads, config.eos_token_id) == (4, 2, 2)
    assert "held-out perplexity after" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "give --data"),
        (["--data", "nowhere"], "no such file or folder: nowhere"),
        (["--data", "nowhere", "--method", "switchlora", "--rank", "128"], "rank 128 is not below"),
        (["--data", "nowhere", "--method", "lora", "--rank", "999"], "rank 999 exceeds"),
        (["--data", "x", "--method", "lora", "--reset-every", "9"], "lora has no option"),
        (["--data", "x", "--rank", "9"], "full has no option rank"),
        (["--data", "x", "--method", "diffora"], "lora, relora or switchlora"),
        (["--data", "x", "--steps", "0"], "--steps is 0: give a whole number from 1"),
        (["--data", "x", "--held-out", "2"], "--held-out is 2.0: give a number from 0 to 1"),
        (["--data", "x", "--hidden-size", "30"], "hidden_size=30 is not a multiple of"),
        (["--data", "x", "--vocab-size", "9"], "give --vocab-size 2048"),
        (["--data", "x", "--max-length", "9999"], "--max-length 9999 exceeds the 512 positions"),
        (["--data", "x", "--tokenizer", "nowhere"], "no such folder: nowhere"),
        (["--data", "x", "--target-modules", "q_proj"], "--target-modules"),
    ],
)
def test_a_wrong_option_is_one_line(capsys, tmp_path, argv, said):
    out = tmp_path / "run"
    assert said in refused(capsys, "pretrain", *argv, "--output-dir", out)
    assert not out.exists(), "nothing is written before everything is checked"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a.txt": b"caf\xe9", "b.txt": b"b"}, "a.txt is not UTF-8 (byte 0xe9 at 3)"),
        ({"a.txt": b"", "b.txt": b" \n"}, "holds any text"),
        ({"a.jpg": b"a"}, "no file ends in .txt or .py"),
        ({"a.txt": b"a"}, "1 of 1 text files would be held out"),
    ],
)
def test_bad_text_is_one_line(capsys, tmp_path, content, said):
    (tmp_path / "texts").mkdir()
    for name, raw in content.items():
        (tmp_path / "texts" / name).write_bytes(raw)
    argv = ["pretrain", "--data", tmp_path / "texts", "--output-dir", tmp_path / "run"]
    assert said in refused(capsys, *argv)
