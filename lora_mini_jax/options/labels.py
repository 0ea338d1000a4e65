"""The options of what is learned: language, the class of a text, or a number for it."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from lora_mini_jax.errors import UserError, flag
from lora_mini_jax.glue import LABEL, TASKS

METRICS: dict[str, tuple[str, ...]] = {
    "language": ("loss",),
    "classification": ("accuracy", "f1", "matthews", "loss"),
    "regression": ("pearson", "spearman", "mse"),
}
"""What can select, by task; the first is the default."""
ONLY_LANGUAGE = ("text_field", "prompt_field", "completion_field", "messages_field", "separator",
                 "packing", "overlong", "samples", "max_new_tokens")  # fmt: skip
ONLY_LABELS = ("text_fields", "label_field", "labels")


@dataclass(frozen=True)
class LabelOptions:
    """What the model learns, and which of its states is kept."""

    task: Literal["language", "classification", "regression"] = "language"
    """language: continue text. classification, regression: tell, with an encoder, a text's class or
    a number for it."""
    glue: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"] | None = (
        None
    )
    """A task of GLUE: sets task, text_fields, label_field, labels and metric. Its data come from
    the hub, or from the folder --data, as the hub or GLUE's authors lay it out."""
    text_fields: tuple[str, ...] = ()
    """Field that holds the text to classify, or two, for pairs; with --task classification or
    regression."""
    label_field: str | None = None
    """Field that holds the class or the number, with --task classification or regression; by
    default "label"."""
    labels: tuple[str, ...] = ()
    """The classes in their order, where the data hold numbers or lack some of them; with --task
    classification."""
    metric: Literal["loss", "accuracy", "f1", "matthews", "pearson", "spearman", "mse"] | None = (
        None
    )
    """Held-out metric that decides which adapter is best. By default accuracy for classes, pearson
    for numbers, GLUE's own for a task of GLUE, and loss for language. F1 is that of the last class
    where there are two, else the mean over the classes."""
    keep: Literal["best", "last"] | None = None
    """Which adapter is saved: the best of those evaluated while training, or the last; by default
    the best, and for language the last."""

    def settle(self, eval_every: int | None) -> None:
        """Fill in what a task of GLUE says, and check what goes together."""
        if self.glue is not None:
            self._fill(self.glue)
        language = self.task == "language"
        defaults: dict[str, Any] = {f.name: f.default for f in fields(self)}
        foreign = ONLY_LABELS if language else ONLY_LANGUAGE
        given = [n for n in foreign if getattr(self, n) != defaults.get(n, getattr(self, n))]
        if given:
            other = "classification or regression" if language else "language"
            raise UserError(f"{flag(given[0])} goes with --task {other}, not with "
                            f"{self.task}: leave it out, or give another --task")  # fmt: skip
        if self.selects_by not in METRICS[self.task]:
            raise UserError(f"--metric {self.metric} does not measure {self.task}: choose one of "
                            f"{', '.join(METRICS[self.task])}")  # fmt: skip
        if language:
            if self.keeps_best and eval_every is None:
                raise UserError("--keep best chooses among evaluations: give --eval-every too")
            return
        if not 1 <= len(self.text_fields) <= 2:
            raise UserError(f"--task {self.task} needs --text-fields: one field of the records, or "
                            f"two for pairs; {len(self.text_fields)} were given")  # fmt: skip
        if self.labels and self.task == "regression":
            raise UserError("--labels are classes, and a regression has none: leave them out")
        if len(set(self.labels)) < len(self.labels) or len(self.labels) == 1:
            raise UserError(f"--labels {' '.join(self.labels)}: give two or more distinct names")

    def _fill(self, name: str) -> None:
        glue = TASKS[name]
        if self.task not in ("language", glue.kind):
            raise UserError(f"--glue {name} is a {glue.kind}: leave --task {self.task} out")
        says = {"text_fields": glue.texts, "label_field": LABEL, "labels": glue.labels,
                "metric": glue.metric}  # fmt: skip
        object.__setattr__(self, "task", glue.kind)
        for option, value in says.items():
            if not getattr(self, option):
                object.__setattr__(self, option, value)

    @property
    def selects_by(self) -> str:
        """The metric."""
        return self.metric or METRICS[self.task][0]

    @property
    def keeps_best(self) -> bool:
        """Whether the best adapter is saved, and not the last."""
        return (self.keep or ("last" if self.task == "language" else "best")) == "best"
