"""The nine tasks of GLUE: what they read, what they predict, and what they are measured by.

Paper: Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language
Understanding" (2018). Fields and labels are called as in ``nyu-mll/glue`` on the Hugging Face hub.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

HUB = "nyu-mll/glue"
LABEL = "label"
"""The field of every task that holds what is to be predicted."""

_NOT_ENTAILED = ("entailment", "not_entailment")


@dataclass(frozen=True)
class Glue:
    """One task.

    Attributes:
        folder: what its folder is called in the files that GLUE's authors distribute.
        texts: the fields that hold the text, or the two texts.
        labels: the names of the classes, in order; none where a number is predicted.
        metric: what GLUE reports, or the first of two.
        columns: columns of the authors' files that have another name on the hub.
        header: the columns of files that do not name them.
        held_out: how the names of the files of the validation split begin.
    """

    folder: str
    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    metric: str = "accuracy"
    columns: Mapping[str, str] = field(default_factory=dict)
    header: tuple[str, ...] | None = None
    held_out: tuple[str, ...] = ("validation", "dev")

    @property
    def kind(self) -> str:
        """``"classification"`` or ``"regression"``."""
        return "classification" if self.labels else "regression"


TASKS = {
    "cola": Glue(
        "CoLA", ("sentence",), ("unacceptable", "acceptable"), "matthews",
        header=("source", LABEL, "note", "sentence"),
    ),
    "sst2": Glue("SST-2", ("sentence",), ("negative", "positive")),
    "mrpc": Glue(
        "MRPC", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "f1",
        {"Quality": LABEL, "#1 String": "sentence1", "#2 String": "sentence2"},
    ),
    "qqp": Glue(
        "QQP", ("question1", "question2"), ("not_duplicate", "duplicate"), "f1",
        {"is_duplicate": LABEL},
    ),
    "stsb": Glue("STS-B", ("sentence1", "sentence2"), (), "pearson", {"score": LABEL}),
    "mnli": Glue(
        "MNLI", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"),
        columns={"sentence1": "premise", "sentence2": "hypothesis", "gold_label": LABEL},
        held_out=("validation_matched", "dev_matched"),
    ),
    "qnli": Glue("QNLI", ("question", "sentence"), _NOT_ENTAILED),
    "rte": Glue("RTE", ("sentence1", "sentence2"), _NOT_ENTAILED),
    "wnli": Glue("WNLI", ("sentence1", "sentence2"), _NOT_ENTAILED[::-1]),
}  # fmt: skip
"""By the names that the hub has for them."""
