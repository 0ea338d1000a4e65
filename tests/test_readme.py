"""What the README shows works as it is shown."""

import json
import re
import shlex
from pathlib import Path

import lora_mini_jax as lmj
from lora_mini_jax.cli import parse
from lora_mini_jax.files import write_text

README = (Path(__file__).parents[1] / "README.md").read_text()
GUIDE = (Path(__file__).parents[1] / "docs/python.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
SHELL = re.findall(r"```sh\n(.*?)```", README, re.S)


def test_the_python_examples_run_and_learn(tmp_path, monkeypatch):
    example, nnx_example = PYTHON
    assert len(example.strip().splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example, names)
    jnp, params, merged, state = (names[n] for n in ("jnp", "params", "merged", "state"))
    before = names["loss_fn"](params, names["adapter"], (names["x"], names["y"]), None)
    assert names["metrics"].loss < 0.9 * before
    assert (tmp_path / "my-adapter" / "adapter.safetensors").exists()
    plain = names["model"].apply({"params": merged}, names["x"])
    assert jnp.abs(plain - names["apply"](params, state.adapter, names["x"])).max() < 1e-5
    exec(nnx_example, names)
    assert jnp.abs(names["model"](names["x"]) - names["y"]).max() < 1e-5


def test_the_guide_goes_from_a_folder_to_a_merged_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = ({"question": f"What is {i} plus 1?", "answer": f" {i + 1}"} for i in range(24))
    write_text(Path("train.jsonl"), "\n".join(map(json.dumps, answers)))
    base = str(Path(lmj.__file__).parent / "base")
    training, later = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    for shown, here in {"path/to/llama": base, "range(100)": "range(12)"}.items():
        assert shown in training
        training = training.replace(shown, here)
    names: dict = {}
    exec(training, names)
    first = names["loss_fn"](names["params"], names["adapter"], names["batches"].batch(11), None)
    assert names["metrics"].loss < 0.8 * first
    exec(later, names)
    reloaded, _ = lmj.models.load("merged")
    assert {path.name for path in Path("for-peft").iterdir()} >= {"adapter_config.json"}
    assert type(reloaded) is type(names["model"])


def test_every_command_shown_parses():
    text = "\n".join(SHELL).replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith("lora-mini ")]
    assert len(commands) >= 5
    for command in commands:
        parse(shlex.split(command, comments=True)[1:])


def test_the_table_of_methods_has_every_method():
    from lora_mini_jax.methods import METHODS

    for name in METHODS:
        assert f"| `{name}` |" in README
