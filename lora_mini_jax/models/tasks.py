"""The heads an encoder can have, and the labels of their classes, as ``config.json`` says them."""

from collections.abc import Sequence
from typing import Any

from lora_mini_jax.errors import UserError

ENDINGS: dict[str | None, str] = {
    None: "Model",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "masked-lm": "ForMaskedLM",
}
"""What a task's architectures are called behind the family's name; None is the bare encoder."""

TASKS = ("sequence-classification", "regression", "token-classification", "masked-lm")
"""The heads that can be asked for; regression is a sequence's classification without classes."""


def with_head(
    hf: dict[str, Any],
    hf_name: str,
    task: str | None,
    num_labels: int | None = None,
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """A ``config.json`` dict with another head in place of its own.

    Args:
        hf: the dict; not changed.
        hf_name: what the family's architectures begin with.
        task: one of `TASKS`.
        num_labels, labels: how many classes there are, or their names; without either those of
            ``hf`` stay, and a regression has one output.

    Raises:
        UserError: a task that is none of `TASKS`, labels for a head without classes, or a
            ``num_labels`` that is not the number of ``labels``.

    Example:
        >>> head = with_head({}, "Bert", "token-classification", labels=["name", "other"])
        >>> head["architectures"], head["id2label"]
        (['BertForTokenClassification'], {'0': 'name', '1': 'other'})
    """
    if task not in TASKS:
        raise UserError(f"task is {task!r}: choose one of {', '.join(TASKS)}")
    if task == "masked-lm":
        if num_labels is not None or labels is not None:
            raise UserError("masked-lm has no labels: leave num_labels and labels out")
        return hf | {"architectures": [hf_name + ENDINGS[task]]}
    names = _names(num_labels, labels)
    if task == "regression":
        changes: dict[str, Any] = {"problem_type": "regression"}
        names = names or ["LABEL_0"]
    else:
        changes = {"problem_type": None} if hf.get("problem_type") == "regression" else {}
    if names:
        changes["id2label"] = {str(i): name for i, name in enumerate(names)}
    kind = "sequence-classification" if task == "regression" else task
    return hf | changes | {"architectures": [hf_name + ENDINGS[kind]]}


def _names(num_labels: int | None, labels: Sequence[str] | None) -> list[str]:
    """The names of the classes that are asked for; none where nothing is."""
    counted = num_labels is None or (type(num_labels) is int and num_labels > 0)
    if not counted or isinstance(labels, str) or labels == []:
        raise UserError(f"num_labels={num_labels!r}, labels={labels!r}: give a whole number from "
                        "1, or a list of names")  # fmt: skip
    if labels is None:
        return [f"LABEL_{i}" for i in range(num_labels or 0)]
    if num_labels not in (None, len(labels)):
        raise UserError(f"num_labels is {num_labels} but there are {len(labels)} labels: give one "
                        "of the two")  # fmt: skip
    return list(labels)


def read_labels(hf: dict[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """(labels, problems) of a ``config.json``: its ``id2label``, or numbered ones."""
    names = hf.get("id2label")
    if names is None:
        count = hf.get("num_labels", 2)
        if type(count) is not int or count < 1:
            return (), [f"num_labels={count!r} is not a whole number from 1"]
        return tuple(f"LABEL_{i}" for i in range(count)), []
    if not isinstance(names, dict) or {str(i) for i in range(len(names))} != set(names):
        return (), [f"id2label {names!r} does not name the classes 0, 1, ..."]
    return tuple(names[str(i)] for i in range(len(names))), []
