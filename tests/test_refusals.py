"""What cannot be done is refused on the command line, by kernel, before a weight is read."""

import pytest

from lora_mini_jax.cli import main
from lora_mini_jax.tasks import language
from tests.runs import options
from tests.test_cli import refused

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class Loaded(BaseException):
    """A weight was read; nothing catches this as a user's error."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("refusals")


@pytest.fixture
def command(place, monkeypatch):
    """What `finetune` is called with, on kernels of 32 x 32 in attention and 32 x 48 in the MLP."""

    def load(*args, **kwargs):
        raise Loaded

    monkeypatch.setattr(language, "load", load)
    given = options(place)
    words = f"finetune --model {given.model} --data {given.data} --prompt-field q"
    return [*words.split(), "--completion-field=a", "--max-length=64", f"--output-dir={place}/run"]


def named(said: str) -> set[str]:
    """The kernels that a message names."""
    return {name for name in ATTENTION + MLP if f"{name}/kernel" in said}


@pytest.mark.parametrize(
    ("argv", "why", "kernels"),
    [
        ("--method miss --mode bat --rank 32", "rank 32 does not divide both in and out", MLP),
        ("--method miss --mode bat --rank 5", "rank 5 does not divide", ATTENTION + MLP),
        ("--method switchlora --rank 32", "rank 32 is not below min(in, out) = 32",
         ATTENTION + MLP),
        ("--method lora --rank 2 --modules-to-save q_proj up_proj", "more than once",
         ("q_proj", "up_proj")),
        ("--method diffora --inner miss(rank=4,mode=bat) --target-modules v_proj",
         "update of miss depends on the kernel", ("v_proj",)),
        ("--method diffora --inner lora --rho 1.5", "rho is 1.5: give a number above 0", ()),
        ("--method diffora --inner lora --rho 0", "rho is 0", ()),
        ("--method diffora --inner lora --rho -0.5", "rho is -0.5", ()),
    ],
)  # fmt: skip
def test_what_cannot_be_adapted_is_one_line_that_names_the_kernels(
    command, place, capsys, argv, why, kernels
):
    said = refused(capsys, *command, *argv.split())
    assert why in said
    assert named(said) == set(kernels)
    assert not (place / "run").exists()


def test_what_can_be_adapted_is_loaded(command):
    with pytest.raises(Loaded):
        main([*command, "--method", "miss", "--mode", "bat", "--rank", "16"])
