"""The shape and the head of BERT and RoBERTa, to and from Hugging Face's ``config.json``."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from lora_mini_jax.errors import UserError
from lora_mini_jax.models.activations import ACTIVATIONS
from lora_mini_jax.models.checks import given, missing, unsupported
from lora_mini_jax.models.tasks import ENDINGS, read_labels
from lora_mini_jax.settings.checks import Joint, Rule, choice, multiple, positive, problems, whole

_PROBLEMS = (
    None, "regression", "single_label_classification", "multi_label_classification",
)  # fmt: skip
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads")  # fmt: skip
_PLAIN = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
"""What other keys of ``config.json`` must be."""


def _are_names(labels: Any) -> bool:
    """Whether these are one or more distinct names."""
    return all(isinstance(label, str) for label in labels) and 0 < len(labels) == len(set(labels))


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder, under Hugging Face's names and with its defaults, and its head.

    Attributes:
        task: which head there is, a key of `ENDINGS`.
        labels: the names of the classes, in order (``id2label`` in ``config.json``); what a
            regression predicts has a name too. Heads without classes keep them unused.
        problem_type: how Hugging Face would train a sequence classifier; None leaves it open.

    Raises:
        UserError: sizes that are not whole numbers from 1, heads that do not divide the width, an
            unknown activation or task, labels that are no distinct names; all in one line.
    """

    hf_name: ClassVar[str]
    """What the names of the architectures begin with."""
    model_type: ClassVar[str]
    rules: ClassVar[tuple[Rule | Joint, ...]] = (
        whole(*_SIZES, "max_position_embeddings"),
        whole("pad_token_id", low=0),
        positive("initializer_range", "layer_norm_eps"),
        multiple("hidden_size", of="num_attention_heads"),
        choice("hidden_act", ACTIVATIONS),
        choice("task", ENDINGS),
        choice("problem_type", _PROBLEMS),
        Rule(("labels",), _are_names,
             lambda name, v: f"{name} {list(v)!r} are not one or more distinct names"),
    )  # fmt: skip
    """What the fields must be; ``type_vocab_size`` is each family's own matter."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    task: str | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem_type: str | None = None

    def __post_init__(self) -> None:
        if bad := problems(self, self.rules):
            raise UserError(f"{self.hf_name} config: {'; '.join(bad)}; correct config.json")

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def has_positions(self) -> bool:
        """Whether absolute positions are added to the words."""
        return True

    @property
    def is_regression(self) -> bool:
        """Whether the sequence classifier predicts numbers: said so, or it has but one output."""
        if self.task != "sequence-classification":
            return False
        single = self.problem_type is None and len(self.labels) == 1
        return single or self.problem_type == "regression"

    @classmethod
    def architectures(cls) -> tuple[str, ...]:
        """The names in ``config.json`` that this class reads."""
        return tuple(cls.hf_name + ending for ending in ENDINGS.values())

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Any:
        """Read the dict of a ``config.json``, written by transformers 4 or 5.

        Raises:
            UserError: an architecture of another family, a variant that is not supported, and
                missing or senseless values, all in one line.
        """
        names = hf.get("architectures") or [cls.hf_name + "Model"]
        tasks = {cls.hf_name + ending: task for task, ending in ENDINGS.items()}
        bad = cls._unsupported(hf)
        if len(names) != 1 or names[0] not in tasks:
            bad.append(f"architecture {', '.join(map(str, names))!r} is not supported, only "
                       f"{', '.join(tasks)}")  # fmt: skip
        elif tasks[names[0]] == "masked-lm" and hf.get("tie_word_embeddings") is False:
            bad.append("tie_word_embeddings=false is not supported for masked-lm")
        labels, problem = read_labels(hf)
        if bad := bad + missing(hf, _SIZES) + problem:
            raise UserError(f"{cls.hf_name} config: {'; '.join(bad)}; use another model or its "
                            "config.json")  # fmt: skip
        known: dict[str, Any] = given(cls, hf) | {"task": tasks[names[0]], "labels": labels}
        return cls(**known)

    @classmethod
    def _unsupported(cls, hf: dict[str, Any]) -> list[str]:
        """The settings of this dict that would make another model than the one here."""
        return unsupported(hf, _PLAIN)

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` dict."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        del out["task"], out["labels"]
        return out | {
            "architectures": [self.hf_name + ENDINGS[self.task]], "model_type": self.model_type,
            "id2label": {str(i): name for i, name in enumerate(self.labels)},
            "label2id": {name: i for i, name in enumerate(self.labels)},
        }  # fmt: skip


@dataclass(frozen=True)
class BertConfig(EncoderConfig):
    """The shape of a BERT; see `EncoderConfig`."""

    hf_name: ClassVar[str] = "Bert"
    model_type: ClassVar[str] = "bert"
    rules = (*EncoderConfig.rules, whole("type_vocab_size"))


@dataclass(frozen=True)
class RobertaConfig(EncoderConfig):
    """The shape of a RoBERTa, whose positions begin after ``pad_token_id``; see `EncoderConfig`."""

    hf_name: ClassVar[str] = "Roberta"
    model_type: ClassVar[str] = "roberta"
    rules = (*EncoderConfig.rules, whole("type_vocab_size"))

    pad_token_id: int = 1


@dataclass(frozen=True)
class XLMRobertaConfig(RobertaConfig):
    """The shape of an XLM-R: a RoBERTa of another name; see `EncoderConfig`."""

    hf_name: ClassVar[str] = "XLMRoberta"
    model_type: ClassVar[str] = "xlm-roberta"
