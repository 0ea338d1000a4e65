"""What the README shows works as it is shown."""

import json
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import lora_mini_jax as lmj
from lora_mini_jax import linen
from lora_mini_jax.cli import parse
from lora_mini_jax.files import write_text
from tests.cases import setup

HOME = Path(__file__).parents[1]
PAGES = {
    page.name: page.read_text() for page in (*HOME.glob("*.md"), *(HOME / "docs").glob("*.md"))
}


def blocks(page: str, kind: str = "python") -> list[str]:
    """What a page shows in fences of this kind."""
    return re.findall(rf"```{kind}\n(.*?)```", PAGES[page], re.S)


def test_the_python_example_runs_and_learns(tmp_path, monkeypatch):
    (example,) = blocks("README.md")
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


def test_the_nnx_example_writes_merged_weights_into_the_model():
    (example,) = blocks("models.md")
    names: dict = {}
    exec(example, names)
    assert abs(names["model"](names["x"]) - names["y"]).max() < 1e-5


def test_the_guide_goes_from_a_folder_to_a_merged_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = ({"question": f"What is {i} plus 1?", "answer": f" {i + 1}"} for i in range(24))
    write_text(Path("train.jsonl"), "\n".join(map(json.dumps, answers)))
    base = str(Path(lmj.__file__).parent / "base")
    training, later, own_loop = blocks("python.md")
    for shown, here in {"path/to/llama": base, "range(100)": "range(12)"}.items():
        assert shown in training
        training = training.replace(shown, here)
    names: dict = {}
    exec(training, names)
    first = names["loss_fn"](names["params"], names["adapter"], names["batches"].batch(11), None)
    assert names["metrics"].loss < 0.8 * first
    exec(later, names)
    exec(own_loop, names)
    assert {*names["grads"]} == {*names["adapter"].trainable}
    reloaded, _ = lmj.models.load("merged")
    assert {path.name for path in Path("for-peft").iterdir()} >= {"adapter_config.json"}
    assert type(reloaded) is type(names["model"])


def test_the_guide_to_meshes_trains_on_all_devices():
    (example,) = blocks("devices.md")
    at = setup("plain")
    targets, x = at.targets, jnp.tile(at.tokens, (8, 1))
    calls = linen.adapt(at.model)
    names: dict = {
        "model": at.model,
        "params": at.params,
        "targets": targets,
        "batch": x,
        "adapter": lmj.init(at.params, lmj.LoRA(rank=2), lmj.select(targets)),
        "loss_fn": lambda params, adapter, x, key: jnp.mean(calls(params, adapter, x) ** 2),
    }
    (rule,) = re.findall(r'r"(.*?)"', example)
    here = next(target.path for target in targets if target.kind == "linear")
    exec(example.replace(rule, here), names)
    assert len(names["state"].adapter.trainable[here]["A"].devices()) == jax.device_count() == 8
    assert names["metrics"].loss > 0


@pytest.mark.parametrize("page", [name for name in PAGES if blocks(name, "sh")])
def test_every_command_shown_parses(page):
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("lora-mini "):
            parse(shlex.split(line, comments=True)[1:])


def test_every_link_from_a_page_leads_somewhere():
    anchors = {name: {anchor(line) for line in text.splitlines() if line.startswith("#")}
               for name, text in PAGES.items()}  # fmt: skip
    for page, text in PAGES.items():
        home = HOME if (HOME / page).exists() else HOME / "docs"
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, place = link.partition("#")
            if not path.startswith("http"):
                assert (home / path).exists(), f"{page}: {link}"
                assert not place or place in anchors[Path(path).name or page], f"{page}: {link}"


def anchor(heading: str) -> str:
    """What a heading is called in a link to it."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("#").strip().lower()).replace(" ", "-")


def test_the_table_of_methods_has_every_method():
    from lora_mini_jax.methods import METHODS

    for name in METHODS:
        assert f"| `{name}` |" in PAGES["README.md"]
