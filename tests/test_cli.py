"""The command line: what it prints, and that every mistake is one line and exit code 2."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version

import jax.numpy as jnp
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_mini_jax import cli
from lora_mini_jax.cli import main, parse
from lora_mini_jax.options import Finetune, to_json
from tests.runs import options, write_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    given = options(folder)
    (folder / "config.json").write_text(json.dumps(to_json(given)))
    main(["finetune", "--config", str(folder / "config.json")])
    return folder


def refused(capsys, *argv) -> str:
    """The one line on stderr that the command ends with, at exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(said) == 1, said
    assert said[0].startswith("lora-mini: ")
    return said[0]


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_and_version_need_no_jax(word):
    code = (
        "import sys, lora_mini_jax.cli as cli\n"
        f"try: cli.main(['{word}'])\nfinally: assert 'jax' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if word == "--version":
        assert out.stdout == f"lora-mini {version('lora-mini-jax')}\n"
    else:
        said = " ".join(out.stdout.split())
        assert "with small adapters. Start with `lora-mini demo`, or" in said
        assert said.index("lora-mini --version") < said.index("finetune Fine-tune")


def test_options_beside_a_config_file_win(place):
    given = parse(["finetune", "--config", str(place / "config.json"), "--rank", "1"])
    assert isinstance(given, Finetune)
    drawn = {"outer_init": "orthogonal"}
    assert given.parsed_settings() == {"rank": 1, "a": 8, "b": 8} | drawn


def test_a_saved_config_gives_the_same_options(place):
    given = options(place, target_modules=("q_proj", "v_proj"), overrides='{"v_proj": {"rank": 1}}')
    (place / "again.json").write_text(json.dumps(to_json(given)))
    assert parse(["finetune", "--config", str(place / "again.json")]) == given


def test_what_a_run_found_is_a_line_each(place, capsys):
    main(["finetune", "--config", str(place / "config.json")])  # it is finished
    lines = capsys.readouterr().out.splitlines()
    assert "trained parameters    224" in lines
    assert max(map(len, (line for line in lines if str(place) not in line))) < 80


def test_inspect_lists_every_kernel_and_writes_nothing(place, capsys):
    before = sorted(place.rglob("*"))
    model = place / "model"
    sizes = ["--model", str(model), "--rank", "2", "--a", "8", "--b", "8", "--json"]
    main(["inspect", *sizes])  # as finetune takes it: the outer factors come from data
    report = json.loads(capsys.readouterr().out)
    assert report["frozen_saved"] == report["frozen_outer"] > 0
    main(["inspect", *sizes, "--outer-init", "orthogonal"])
    report = json.loads(capsys.readouterr().out)
    assert len(report["kernels"]) == 7
    assert report["trainable"] == 7 * 2 * 16 == sum(k["trained"] for k in report["kernels"])
    assert report["optimizer_bytes"] == 4 * (2 * report["trainable"] + 1)
    assert report["step_gflop"] < report["full_step_gflop"]
    assert report["frozen_saved"] == 0 < report["frozen_outer"]
    main(["inspect", "--model", str(model), "--rank", "2", "--a", "8", "--b", "8"])
    said = capsys.readouterr().out
    assert "layers_0/mlp/up_proj/kernel" in said
    assert "\nmethod            lora-mini:rank=2,alpha=16.0,a=8,b=8,outer_init=gradient," in said
    assert sorted(place.rglob("*")) == before


def test_generate_continues_prompts_with_and_without_the_adapter(place, capsys):
    model = ["--model", str(place / "model"), "--max-new-tokens", "3"]
    main(["generate", *model, "--prompt", "say red 1\n", "say blue 2\n"])
    plain = capsys.readouterr().out
    adapter = ["--adapter", str(place / "run" / "adapter")]
    main(["generate", *model, *adapter, "--prompt", "say red 1\n", "say blue 2\n"])
    adapted = capsys.readouterr().out
    assert plain.startswith("say red 1")
    assert adapted.startswith("say red 1")


def test_the_base_is_the_adapters_own_unless_another_is_named(place, capsys, tmp_path):
    adapter = ["--adapter", str(place / "run" / "adapter")]
    prompt = ["--prompt", "say red 1\n", "--max-new-tokens", "3"]
    main(["generate", "--model", str(place / "model"), *adapter, *prompt])
    named = capsys.readouterr().out
    main(["generate", *adapter, *prompt])
    assert capsys.readouterr().out == named
    shutil.copytree(place / "run" / "adapter", tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter/adapter.json").read_text())
    (tmp_path / "adapter/adapter.json").write_text(json.dumps({**record, "base": ""}))
    said = refused(capsys, "generate", "--adapter", tmp_path / "adapter", *prompt)
    assert "does not say which model it was trained on: give --model" in said
    (tmp_path / "adapter/adapter.json").write_text(json.dumps({**record, "base": "../chat"}))
    said = refused(capsys, "generate", "--adapter", tmp_path / "adapter", *prompt)
    named = f"'../chat', which {tmp_path / 'adapter'} was trained on, is neither a local folder nor"
    assert named in said
    assert said.endswith("give its folder as --model, or a hub id")


def test_merge_writes_what_transformers_loads_with_equal_logits(place):
    import jax.numpy as jnp

    from lora_mini_jax import linen, models
    from lora_mini_jax.saved import storage

    main(["merge", "--model", str(place / "model"), "--adapter", str(place / "run" / "adapter"),
          "--output-dir", str(place / "merged")])  # fmt: skip
    model, params = models.load(place / "model")
    adapter = storage.load(place / "run" / "adapter", params)
    ids = [[1, 70, 71, 80, 90, 91]]
    ours = linen.adapt(model)(params, adapter, jnp.array(ids))
    theirs = AutoModelForCausalLM.from_pretrained(place / "merged")(torch.tensor(ids)).logits
    assert abs(theirs.detach().numpy() - ours).max() < 1e-4 * abs(ours).max()
    assert AutoTokenizer.from_pretrained(place / "merged").encode("red")


def test_export_writes_what_peft_loads_with_equal_logits(place):
    import jax.numpy as jnp
    from peft import PeftModel

    from lora_mini_jax import linen, models
    from lora_mini_jax.saved import storage

    main(["export", "--model", str(place / "model"), "--adapter", str(place / "run" / "adapter"),
          "--output-dir", str(place / "peft")])  # fmt: skip
    model, params = models.load(place / "model")
    adapter = storage.load(place / "run" / "adapter", params)
    ids = [[1, 70, 71, 80, 90, 91]]
    ours = linen.adapt(model)(params, adapter, jnp.array(ids))
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    theirs = PeftModel.from_pretrained(base, place / "peft")(torch.tensor(ids)).logits
    assert abs(theirs.detach().numpy() - ours).max() < 1e-4 * abs(ours).max()


def test_compare_runs_methods_and_seeds(place, capsys):
    specs = ("lora-mini:rank=1", "lora-mini:rank=2,learning_rate=0.02")
    given = ["--config", str(place / "config.json"), "--output-dir", str(place / "both")]
    main(["compare", *given, "--max-steps", "2", "--methods", *specs, "--seeds", "0", "1"])
    summary = json.loads((place / "both" / "summary.json").read_text())
    rows = summary["rows"]
    assert [(r["spec"], r["seed"]) for r in rows] == [(s, n) for s in specs for n in (0, 1)]
    assert rows[0]["trainable"] * 2 == rows[2]["trainable"]
    assert "±" in capsys.readouterr().out
    assert (place / "both" / "report.html").exists()


def test_a_folder_is_of_one_comparison_or_of_one_run(place, capsys, monkeypatch):
    from lora_mini_jax.runs import compare as module

    given = ["--config", place / "config.json", "--max-steps", "1", "--seeds", "0"]
    lora, other = ("--methods", "lora:rank=1"), ("--methods", "lora:rank=2")
    own = ["--output-dir", place / "one"]
    main([str(word) for word in ("compare", *given, *lora, *own)])
    finished = (place / "one" / "summary.json").read_bytes()
    monkeypatch.setattr(module, "planned", lambda options: pytest.fail("work has begun"))
    said = refused(capsys, "compare", *given, *other, *own)
    assert "methods: ['lora:rank=1'] -> ['lora:rank=2']" in said
    assert (place / "one" / "summary.json").read_bytes() == finished
    run = (place / "run" / "summary.json").read_bytes()
    said = refused(capsys, "compare", *given, *lora, "--output-dir", place / "run")
    assert "no comparison.json" in said
    assert (place / "run" / "summary.json").read_bytes() == run
    said = refused(capsys, "finetune", "--config", place / "config.json", *own)
    assert "no config.json" in said
    said = refused(capsys, "pretrain", "--data", place, "--output-dir", place / "run")
    assert "a run of another command" in said
    monkeypatch.undo()
    main([str(word) for word in ("compare", *given, *lora, *own)])  # the same again
    (place / "one" / "summary.json").unlink()  # as one that was stopped
    main([str(word) for word in ("compare", *given, *other, *own)])


def test_a_demo_touches_no_other_folder(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("mine")
    assert "not a run folder" in refused(capsys, "demo", "--output-dir", tmp_path)
    assert (tmp_path / "data" / "train.jsonl").read_text() == "mine"
    said = refused(capsys, "demo", "--output-dir", tmp_path / "new", "--steps", "0")
    assert "--steps is 0" in said
    assert not (tmp_path / "new").exists()


def test_a_folder_whose_name_is_too_long_is_one_line(place, capsys):
    argv = ["finetune", "--config", place / "config.json", "--output-dir", place / ("x" * 300)]
    assert "File name too long" in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--method", "adalora", "--tinit", "5", "--max-steps", "4"], "tinit"),
        (["--method", "diffora", "--inner", "lora", "--max-train-examples", "2"], "two rows"),
        (["--epochs", "inf"], "--epochs is inf: give a finite number above 0"),
        (["--seed", "9" * 20], "--seed is 99999999999999999999: give a whole number"),
        (["--tensorboard"], "cannot be imported (no such descriptor)"),
    ],
)
def test_what_cannot_begin_leaves_no_folder(place, capsys, monkeypatch, argv, said):
    def broken(name, *args, real=__import__, **kwargs):
        if name == "tensorboardX":
            raise TypeError("no such descriptor")
        return real(name, *args, **kwargs)

    monkeypatch.setattr("builtins.__import__", broken)
    given = options(place)
    words = f"finetune --model {given.model} --data {given.data} --max-length 64"
    fields = ["--prompt-field", "q", "--completion-field", "a", "--output-dir", place / "none"]
    assert said in refused(capsys, *words.split(), *fields, *argv)
    assert not (place / "none").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "finetune, compare"),
        ([], "no command: choose from finetune"),
        (["fintune"], "unknown command 'fintune': choose from finetune, compare"),
        (["finetune", "--modl", "x"], "--modl: did you mean --model"),
        (
            ["finetune", "--lr=1", "--zzz"],
            "--lr: did you mean --learning-rate?, --zzz (see lora-mini finetune --help)",
        ),
        (["finetune", "--no-packin"], "--no-packing"),
        (["finetune", "--batch-size", "x"], "--batch-size is 'x': give a whole number"),
        (["finetune", "--learning-rate", "x"], "--learning-rate is 'x': give a number"),
        (["finetune", "--dtype", "float64"], "--dtype is 'float64': choose float32 or bfloat16"),
        (["finetune", "--data", "x", "--rank", "two"], "rank is 'two'"),
        (["finetune", "--data", "x", "--rank", "0"], "rank is 0"),
        (["finetune", "--data", "x", "--method", "magic"], "choose one of adalora"),
        (["finetune", "--data", "x", "--method", "lora", "--a", "8"], "lora has no option a"),
        (["finetune", "--data", "x", "--rank", "9", "--a", "8"], "lower rank, or raise a and b"),
        (["finetune", "--data", "x", "--outer-init", "magic"], "normal, fan_in"),
        (["finetune", "--data", "x", "--learning-rate", "-1"], "--learning-rate"),
        (["finetune", "--data", "x", "--schedule", "magic"], "linear"),
        (["finetune", "--data", "x", "--overrides", "{"], "--overrides is not JSON"),
        (["finetune", "--data", "x", "--prompt-field", "q"], "completion_field"),
        (["finetune"], "give --data"),
        (["finetune", "--config"], "--config needs a file"),
        (["finetune", "--config", "nowhere.json"], "no such file: nowhere.json"),
        (["generate"], "--prompt"),
        (["compare", "--data", "x", "--methods", "magic"], "choose one of"),
        (["compare", "--data", "x", "--methods", "lora:rank"], "lora-mini:rank=4"),
        (["compare", "--data", "x", "--methods", "lora:rank=x"], "rank is 'x'"),
        (["finetune", "--data", "x", "--method", "vera", "--lora-plus-ratio", "2"], "trains b, d"),
        (["inspect", "--target-modules", "embed_tokens"], "take outer_init orthogonal"),
    ],
)
def test_a_wrong_option_is_one_line(capsys, argv, said):
    assert said in refused(capsys, *argv)


def bad_data(place, name):
    """A data file that is wrong in one way."""
    path = place / name
    content = {
        "empty.jsonl": b"",
        "broken.jsonl": b'{"q": "a", "a": "b"}\n{"q": \n',
        "latin.jsonl": b'{"q": "a", "a": "b"}\n{"q": "\xe9", "a": "b"}\n',
        "fields.jsonl": b'{"q": "a", "a": "b"}\n{"q": "a", "answer": "b"}\n',
        "model.pkl": b"\x80\x04.",
    }
    if name in content:
        path.write_bytes(content[name])
    return path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.jsonl", "missing.jsonl"),
        ("empty.jsonl", "empty"),
        ("broken.jsonl", "broken.jsonl, line 2"),
        ("latin.jsonl", "latin.jsonl, line 2"),
        ("fields.jsonl", "line 2: no field 'a' (its fields: q, answer)"),
        ("model.pkl", "jsonl"),
    ],
)
def test_bad_data_is_one_line_and_leaves_no_adapter(place, capsys, name, said):
    out = place / f"bad-{name}"
    argv = ["finetune", "--config", place / "config.json", "--data", bad_data(place, name)]
    assert said in refused(capsys, *argv, "--output-dir", out)
    assert not (out / "adapter").exists()


def test_output_that_nobody_reads_on_is_no_error():
    command = f"{sys.executable} -m lora_mini_jax.cli finetune --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage: lora-mini finetune")
    assert done.stderr == ""


def test_a_run_needs_no_stderr(place, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    given = ["--config", str(place / "config.json"), "--output-dir", str(place / "silent")]
    main(["finetune", *given, "--max-steps", "1"])
    assert (place / "silent" / "summary.json").exists()


def test_a_device_without_room_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(cli, "carry_out", lambda options: jnp.zeros(2**46, jnp.int8) + 1)
    said = refused(capsys, "methods")
    assert "not enough memory (RESOURCE_EXHAUSTED" in said
    assert "--remat" in said


def test_a_model_that_is_not_there_is_one_line(place, capsys):
    argv = ["finetune", "--config", place / "config.json", "--model", place / "nowhere"]
    assert "nowhere" in refused(capsys, *argv, "--output-dir", place / "x1")


def test_a_pattern_that_matches_nothing_lists_the_kernels(place, capsys):
    argv = ["finetune", "--config", place / "config.json", "--target-modules", "wq"]
    said = refused(capsys, *argv, "--output-dir", place / "x2")
    assert "no kernel matches 'wq'" in said
    assert "layers_0/self_attn/q_proj/kernel" in said


def test_a_size_that_does_not_fit_lists_the_kernels(place, capsys):
    argv = ["finetune", "--config", place / "config.json", "--a", "40", "--b", "40"]
    said = refused(capsys, *argv, "--output-dir", place / "x3")
    assert "layers_0/self_attn/q_proj/kernel (32 x 32): a = 40 exceeds 32" in said
    assert "(--exclude-modules; in Python the exclude of select)" in said
    assert "(--overrides; in Python the overrides of init)" in said


def test_an_adapter_of_another_model_is_one_line(place, capsys):
    other = write_model(place / "other", seed=5)
    argv = ["generate", "--model", other, "--prompt", "a", "--adapter", place / "run" / "adapter"]
    assert "--allow-different-base" in refused(capsys, *argv)
    main([str(word) for word in (*argv, "--allow-different-base", "--max-new-tokens", "2")])
    wide = write_model(place / "wide", hidden_size=64)
    said = refused(capsys, "generate", "--model", wide, "--prompt", "a",
                   "--adapter", place / "run" / "adapter", "--allow-different-base")  # fmt: skip
    assert "does not fit" in said


def test_a_truncated_model_or_adapter_is_one_line(place, capsys):
    import shutil

    for source, name, option in (
        (place / "model", "model.safetensors", "--model"),
        (place / "run" / "adapter", "adapter.safetensors", "--adapter"),
    ):
        copy = shutil.copytree(source, place / f"cut{option}")
        (copy / name).write_bytes((copy / name).read_bytes()[:100])
        argv = {"--model": place / "model", "--prompt": "a", option: copy}
        said = refused(capsys, "generate", *(word for pair in argv.items() for word in pair))
        assert name in said


def test_a_model_folder_with_pickles_only_is_refused(place, capsys):
    folder = place / "pickled"
    folder.mkdir()
    for file in ("config.json", "tokenizer.json"):
        (folder / file).write_text((place / "model" / file).read_text())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "safetensors" in refused(capsys, "generate", "--model", folder, "--prompt", "a")


def test_merging_into_a_folder_in_use_is_refused(place, capsys):
    (place / "precious").mkdir()
    (place / "precious" / "d.jsonl").write_text("keep")
    argv = ["merge", "--model", place / "model", "--adapter", place / "run" / "adapter"]
    assert "precious" in refused(capsys, *argv, "--output-dir", place / "precious")
    assert (place / "precious" / "d.jsonl").read_text() == "keep"


@pytest.mark.parametrize("here", ["run", "data.jsonl"])
def test_exporting_over_anything_but_an_export_is_refused_at_once(place, capsys, here, monkeypatch):
    from lora_mini_jax.commands import adapters

    monkeypatch.setattr(adapters.Trained, "load", lambda *given: pytest.fail("the model was read"))
    before = sorted(place.rglob("*"))
    argv = ["export", "--model", place / "model", "--adapter", place / "run" / "adapter"]
    assert here in refused(capsys, *argv, "--output-dir", place / here)
    assert sorted(place.rglob("*")) == before


def test_inspect_counts_the_frozen_factors_that_are_saved(place, capsys):
    model = ["--model", str(place / "model"), "--method", "lora-mini-diag", "--rank", "4", "--json"]
    main(["inspect", *model])
    report = json.loads(capsys.readouterr().out)
    assert report["frozen_saved"] == report["frozen_outer"] > 0
    assert report["trainable"] == 7 * 4
