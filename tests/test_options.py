"""Options: from a file, beside one, of several runs at once; and what is said of wrong ones."""

import io
import json
import math
import os
import subprocess
import sys

import pytest

from lora_mini_jax import UserError, cli
from lora_mini_jax.adapters.sites import plan_sites
from lora_mini_jax.cli import main, parse
from lora_mini_jax.methods import METHODS, from_dict, from_spec
from lora_mini_jax.options import Compare, Finetune, Generate, to_json
from lora_mini_jax.options.paths import local
from lora_mini_jax.selection import select
from lora_mini_jax.settings.spec import to_spec
from lora_mini_jax.tree import Target
from tests.encoder_runs import write_encoder
from tests.test_cli import refused


@pytest.fixture
def file(tmp_path):
    """Writes a config file; returns the words that give it."""

    def write(**values):
        (tmp_path / "given.json").write_text(json.dumps(values))
        return ["--config", str(tmp_path / "given.json")]

    return write


@pytest.mark.parametrize(
    ("name", "value", "give"),
    [
        ("packing", "false", "true or false"),
        ("keep", "x", "one of best, last or null"),
        ("schedule", "foo", "one of linear, cosine, constant"),
        ("dtype", "float99", "one of float32, bfloat16"),
        ("seed", 1.5, "a whole number"),
        ("max_length", 64.0, "a whole number"),
        ("batch_size", "8", "a whole number"),
        ("batch_size", True, "a whole number"),
        ("learning_rate", "0.1", "a number"),
        ("model", 5, "text in quotes"),
        ("overrides", {"mlp": {"rank": 4}}, "text in quotes"),
        ("settings", "rank=4", "a list, each text in quotes"),
        ("settings", [4], "a list, each text in quotes"),
        ("max_steps", "2", "a whole number or null"),
    ],
)
def test_a_value_of_another_kind_in_a_file_is_one_line(file, capsys, name, value, give):
    said = refused(capsys, "finetune", *file(data="x", **{name: value}))
    assert f"given.json: {name} is {json.dumps(value)}: give {give}" in said


def test_all_that_is_wrong_in_a_file_is_one_line(file, capsys):
    said = refused(capsys, "finetune", *file(schedule="foo", batchsize=8, seed="0"))
    assert all(word in said for word in ("schedule is", "did you mean batch_size?", "seed is"))


def test_a_whole_number_in_a_file_is_a_number_too(file):
    rate = parse(["finetune", *file(data="x", learning_rate=1)]).learning_rate
    assert (rate, type(rate)) == (1.0, float)


def test_settings_of_the_method_may_stand_in_a_file_as_on_the_command_line(file):
    words = file(data="x", settings=["rank=4", "a=16"], outer_init="normal", rank=2)
    given = parse(["finetune", *words, "--b", "8"]).parsed_settings()
    assert given == {"rank": 2, "a": 16, "outer_init": "normal", "b": 8}


def test_what_stands_in_a_file_is_checked_with_what_stands_beside_it(file, capsys):
    asked = parse(["generate", *file(max_new_tokens=3), "--prompt", "x"])
    assert asked == Generate(("x",), max_new_tokens=3)
    assert "--prompt" in refused(capsys, "generate", *file(max_new_tokens=3))
    words = file(task="classification", accumulate=3, method="lora", data="x")
    both = parse(["finetune", *words, "--text-fields", "t", "--batch-size", "9", "--rslora"])
    assert both == Finetune(data="x", task="classification", text_fields=("t",), accumulate=3,
                            batch_size=9, method="lora", settings=("rslora=true",))  # fmt: skip
    said = refused(capsys, "finetune", *file(accumulate=3, data="x"))
    assert "--accumulate 3 does not divide --batch-size 8" in said


def test_one_file_is_given(file, capsys):
    said = refused(capsys, "finetune", *file(data="x"), "--config=other.json")
    assert "--config is given 2 times: give one file" in said
    assert "--config needs a file" in refused(capsys, "finetune", "--config", "--data", "x")


def test_a_comparison_refuses_what_its_runs_have_of_their_own(file, capsys):
    both = ["compare", "--data", "x", "--methods", "lora", "full", "--seeds", "0"]
    said = refused(capsys, *both, "--method", "dora", "--seed", "7")
    assert "--method: did you mean --methods" in said
    assert "--seed: did you mean --seeds" in said
    for own in ("seed=3", "method=dora", "output_dir=x"):
        said = refused(capsys, "compare", "--data", "x", "--methods", f"lora:{own}")
        assert f"lora has no option {own.partition('=')[0]}" in said
    run = to_json(Finetune(data="x", method="dora", seed=7, max_steps=3))
    given = parse(["compare", *file(**run), "--methods", "lora", "--seeds", "1"])
    assert given == Compare(data="x", methods=("lora",), seeds=(1,), max_steps=3,
                            output_dir="runs/finetune")  # fmt: skip


def test_a_shared_setting_is_one_of_a_method_that_is_compared(capsys):
    both = ["compare", "--data", "x", "--methods", "lora", "full"]
    said = refused(capsys, *both, "--a", "4", "--outer-init", "normal")
    assert "no method of --methods lora full has a setting a, outer_init" in said
    given = parse([*both, "--rslora", "true", "--lora-plus-ratio", "1"])
    assert given.run_options("lora", 0).adapter_method().rslora
    assert given.run_options("full", 0).parsed_settings() == {}
    plus = ["compare", "--data", "x", "--lora-plus-ratio", "2", "--methods"]
    assert parse([*plus, "lora", "dora"]).lora_plus_ratio == 2
    assert "vera trains b, d" in refused(capsys, *plus, "lora", "vera")


def test_options_in_a_spec_are_of_their_own_kinds(capsys):
    spec = "lora:learning_rate=1,target_modules=q_proj+v_proj,eval_every=none"
    run = parse(["compare", "--data", "x", "--methods", spec]).run_options(spec, 3)
    assert (run.learning_rate, run.target_modules) == (1.0, ("q_proj", "v_proj"))
    assert (run.eval_every, run.seed) == (None, 3)
    for own, give in (("schedule=foo", "one of linear"), ("batch_size=1.5", "a whole number")):
        said = refused(capsys, "compare", "--data", "x", "--methods", f"lora:{own}")
        assert f"give {give}" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("finetune --data x --seed 99999999999999999999", "--seed is 99999999999999999999: give"),
        ("finetune --data x --seed 4294967296", "from 0, below 2**32"),
        ("compare --data x --seeds 0 4294967296", "--seeds is 4294967296"),
        ("pretrain --data x --seed -1", "--seed is -1"),
        ("generate --prompt x --seed -1", "--seed is -1"),
        ("generate --prompt", "--prompt has no text"),
        ("generate --prompt \udcff\udcfe", r"'\udcff\udcfe' is not UTF-8"),
        ("generate --prompt x --prompts y.jsonl", "--prompt and --prompts are both given"),
        ("generate --prompt x --system y", "--system is for chats: add --chat"),
        ("generate --prompt x --chat --system \udcff", r"--system '\udcff' is not UTF-8"),
        ("generate --prompt x --stop=", "--stop has an empty text"),
        ("generate --prompts s3://b/x.jsonl", "--prompts s3://b/x.jsonl: an address is no path"),
        ("finetune --data x --learning-rate inf", "--learning-rate is inf: give a finite number"),
        ("finetune --data x --weight-decay inf", "--weight-decay is inf"),
        ("finetune --data x --epochs inf", "--epochs is inf"),
        ("finetune --data x --max-grad-norm nan", "--max-grad-norm is nan"),
        ("inspect --batch-size 0", "--batch-size is 0: give a whole number from 1"),
        ("inspect --max-length 0", "--max-length is 0"),
        ("inspect --max-length -1", "--max-length is -1"),
        ("inspect --max-length 999999", "--max-length 999999 exceeds the"),
        ("demo --steps 0", "--steps is 0"),
        ("finetune --processes 2 --process 1", "--processes 2 --process 1 without --coordinator"),
        ("pretrain --coordinator auto --process 0", "--process 0 with --coordinator auto"),
        ("finetune --output-dir ~nobody-of-this-name/x", "there is no such user"),
        (
            "finetune --data gs://b/d.jsonl --output-dir gs://b/run",
            "--data gs://b/d.jsonl, --output-dir gs://b/run: an address is no path; mount it",
        ),
        ("finetune --data x.jsonl --cache-dir=", "--cache-dir is empty"),
        ("finetune --rankk 3", "--rankk: did you mean --rank?"),
        ("finetune --data x --rank", "--rank needs a value"),
        ("finetune --rank --data x", "--rank needs a value"),
        ("pretrain --data x --hidden-size 15", "--hidden-size 15, the rest as in"),
    ],
)
def test_a_wrong_option_is_one_line(capsys, argv, said):
    told = refused(capsys, *argv.split())
    assert said in told
    assert "correct config.json" not in told


def test_inspect_refuses_rows_that_an_encoder_has_no_positions_for(tmp_path, capsys):
    folder = write_encoder(tmp_path / "bert")
    argv = ["inspect", "--model", folder, "--method", "lora", "--rank", "1"]
    assert "9999" in refused(capsys, *argv, "--max-length", "9999")


def test_gradients_that_are_not_clipped_are_read_back(file):
    given = Finetune(data="x", max_grad_norm=math.inf)
    assert parse(["finetune", *file(**to_json(given))]) == given


@pytest.mark.parametrize("words", [["finetune", "--data", "x"], ["generate", "--prompt", "x"]])
def test_an_interruption_promises_only_what_there_is(capsys, monkeypatch, words):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "carry_out", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 130
    if words[0] == "generate":
        assert said == "lora-mini: stopped"
    else:
        assert "goes on from the last checkpoint, if there is one" in said


def test_home_is_read_as_a_shell_reads_it(monkeypatch, file):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["finetune", *file(data="~/x.jsonl"), "--output-dir=~/run", "--separator", "~/"]
    given = local(parse(words))
    assert (given.data, given.output_dir) == ("/home/me/x.jsonl", "/home/me/run")
    assert (given.separator, given.valid) == ("~/", "")
    words = ["pretrain", "--data", "~/a", "b", "--output-dir", "run"]
    assert local(parse(words)).data == ("/home/me/a", "b")


def test_a_plan_joins_no_processes(monkeypatch):
    done = []
    monkeypatch.setattr(cli, "carry_out", done.append)
    main(["plan", "--coordinator", "127.0.0.1:1", "--processes", "2", "--process", "0"])
    assert done


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_devices_that_are_not_there_are_one_line(platform):
    code = "from lora_mini_jax.cli import main; main(['generate', '--prompt', 'a'])"
    env = {**os.environ, "JAX_PLATFORMS": platform, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 2, done.stderr
    assert f"JAX cannot start on devices (JAX_PLATFORMS='{platform}'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_terminal_need_not_know_every_character(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(cli, "carry_out", lambda options: print("né"))
    main(["methods"])
    terminal.flush()
    assert terminal.buffer.getvalue() == b"n?\n"


def test_kernels_that_differ_in_their_layer_alone_are_told_as_one():
    names = ("q_proj", "v_proj")
    kernels = [Target(f"layers_{i}/{n}/kernel", (8, 8)) for i in range(40) for n in names]
    head = Target("lm_head/kernel", (8, 32))
    method = from_dict({"method": "lora", "rank": 9})
    with pytest.raises(UserError) as error:
        plan_sites(method, [*kernels, head])
    each = "layers_*/{}/kernel (8 x 8): rank 9 exceeds min(in, out) = 8"
    assert str(error.value).startswith("; ".join(each.format(n) for n in names))
    assert str(error.value).count("kernel (") == 3
    with pytest.raises(UserError) as error:
        select([*kernels, head], "foo")
    there = "layers_*/q_proj/kernel, layers_*/v_proj/kernel, lm_head/kernel"
    assert str(error.value) == f"no kernel matches 'foo'; the kernels are: {there}"
    with pytest.raises(UserError, match=r"name15/kernel and 4 more$"):
        select([Target(f"name{i}/kernel", (8, 8)) for i in range(20)], "foo")


def test_methods_shows_what_can_be_given_and_what_finetune_takes(capsys):
    main(["methods"])
    lines = capsys.readouterr().out.splitlines()
    flags = {
        line.partition(":")[0]: below.split()
        for line, below in zip(lines[::2], lines[1::2], strict=True)
    }
    assert "--outer-init orthogonal (finetune: gradient)" in " ".join(flags["lora-mini"])
    for name in METHODS:
        needed = {"inner": "lora"} if "inner" in METHODS[name].field_names() else {}
        try:
            from_dict({"method": name, "dropout": 0.5, **needed})
        except UserError:
            assert "--dropout" not in flags[name]
        else:
            assert "--dropout" in flags[name]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("merge", "missing: --adapter, --output-dir"),
        ("merge --adapter=x", "missing: --output-dir"),
        ("merge --adaptr x", "no such option: --adaptr: did you mean --adapter?"),
        ("finetune --quantize int4", "--quantize is 'int4': choose int8 or nf4"),
        (
            "merge --output_dir x --dtype=int4",
            "missing: --adapter; --dtype is 'int4': choose float32, bfloat16 or float16",
        ),
        (
            "finetune --quantize None --schedule None --keep x --metrc x",
            "no such option: --metrc: did you mean --metric?; --schedule is 'None': "
            "choose linear, cosine or constant; --keep is 'x': choose best or last",
        ),
        ("finetune --quantize --data x", "--quantize needs a value"),
        ("inspect --budget x", "--budget is 'x': give a whole number"),
        ("inspect --batch-size it's", '--batch-size is "it\'s": give a whole number'),
        ("compare --seeds 0 x", "--seeds is '0', 'x': give whole numbers"),
        ("inspect --batch-size 1 2", "no option takes 2"),
    ],
)
def test_what_is_missing_or_no_choice_is_said_in_few_words(capsys, argv, said):
    command = argv.partition(" ")[0]
    told = refused(capsys, *argv.split())
    assert told == f"lora-mini: {said} (see lora-mini {command} --help)"


def test_what_a_file_gives_is_not_missing(file, capsys):
    said = refused(capsys, "merge", *file(output_dir="x"))
    assert said == "lora-mini: missing: --adapter (see lora-mini merge --help)"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_shown_as_it_is_given_to_compare(name):
    inner = {"inner": "lora-mini(rank=4,a=16)"} if name == "diffora" else {}
    method = from_dict({"method": name, **inner})
    shown = to_spec(method.to_dict())
    assert from_spec(shown) == method
    assert Compare(methods=(shown,)).run_options(shown, 0).adapter_method() == method


def test_help_shows_no_path_of_this_machine(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = " ".join(capsys.readouterr().out.replace("│", "").split())
        assert "lora_mini_jax/base" not in said
        bases = "--model STR" in said or command == "pretrain"
        assert ("(default: 'the model in the package')" in said) == bases
        without = "--model STR" in said or command == "generate"
        assert ("the small demo model in the package is used." in said) == without
