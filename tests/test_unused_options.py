"""An option that would do nothing, or be outdone in silence, is refused in one line."""

from typing import Any

import pytest

from lora_mini_jax import UserError
from lora_mini_jax.data import Fields
from lora_mini_jax.options import Compare, Finetune, Inspect
from lora_mini_jax.options.config_file import defaults_from
from lora_mini_jax.runs.finetune import total_steps

REFUSED: dict[str, tuple[Any, str]] = {
    "a rank beside a budget": (
        lambda: Finetune(budget=5000, settings=("rank=8",)),
        "--budget 5000 chooses --rank: leave out the one or the other",
    ),
    "widths beside a budget": (
        lambda: Finetune(budget=5000, settings=("a=8", "b=8", "alpha=2")),
        "--budget 5000 chooses --a, --b: leave",
    ),
    "overrides beside a budget": (
        lambda: Finetune(budget=5000, overrides='{"mlp": {"rank": 4}}'),
        "--budget 5000 chooses one size for all kernels: leave out --overrides",
    ),
    "a budget of no method": (lambda: Finetune(budget=9, method="full"), "full has no size"),
    "a negative budget": (lambda: Finetune(budget=-1), "--budget -1 is not allowed: give"),
    "a batch of no step": (
        lambda: Inspect(config_only=True, batch_size=3),
        "--config-only skips: leave out",
    ),
    "a separator of texts": (
        lambda: Fields(separator="X").resolved({"text": "a"}),
        "separator 'X' goes between prompt and completion, and these records have none",
    ),
    "methods twice": (
        lambda: Compare(methods=("lora:rank=4", "lora:rank=4")),
        "--methods says lora:rank=4 more than once",
    ),
    "seeds twice": (lambda: Compare(seeds=(0, 1, 1)), "--seeds says 1 more than once"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_is_refused(name: str) -> None:
    call, said = REFUSED[name]
    with pytest.raises(UserError, match=said):
        call()


@pytest.mark.parametrize("settings", [(), ("alpha=4",), ("outer_init=svd",)])
def test_a_budget_goes_with_what_is_no_size(settings: tuple[str, ...]) -> None:
    assert Finetune(budget=5000, settings=settings).budget == 5000


@pytest.mark.parametrize(("given", "steps"), [({}, 20), ({"epochs": 0.5}, 5), ({"max_steps": 3}, 3),
                                              ({"max_steps": 400}, 400)])  # fmt: skip
def test_steps_that_are_given_go_before_epochs(given: dict[str, Any], steps: int) -> None:
    assert total_steps(Finetune(**given), 10) == steps


def test_the_config_of_another_command_is_called_so(tmp_path: Any) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"method": "lora", "epochs": 2.0, "valid": "", "seed": 0, "samples": 1}')
    with pytest.raises(UserError, match=r"config of another command, with 4 options that this one"):
        defaults_from(Inspect, str(path))
    path.write_text("[1]")
    with pytest.raises(UserError, match="holds a list, not a JSON object"):
        defaults_from(Inspect, str(path))
