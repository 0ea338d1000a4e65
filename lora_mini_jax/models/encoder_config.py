"""The shape and the head of BERT and RoBERTa, to and from Hugging Face's ``config.json``."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from lora_mini_jax.errors import UserError
from lora_mini_jax.models.activations import ACTIVATIONS
from lora_mini_jax.models.checks import is_real, is_size
from lora_mini_jax.models.tasks import ENDINGS, read_labels

_PROBLEMS = (
    None, "regression", "single_label_classification", "multi_label_classification",
)  # fmt: skip
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads")  # fmt: skip


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
    least_types: ClassVar[int] = 1
    """The smallest ``type_vocab_size``."""

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
        if bad := self._problems():
            raise UserError(f"{self.hf_name} config: {'; '.join(bad)}; correct config.json")

    def _problems(self) -> list[str]:
        """What is wrong with the values."""
        least = dict.fromkeys((*_SIZES, "max_position_embeddings"), 1)
        least |= {"type_vocab_size": self.least_types, "pad_token_id": 0}
        bad = [f"{n}={getattr(self, n)!r} is not a whole number from {low}"
               for n, low in least.items()
               if not is_size(getattr(self, n), low)]  # fmt: skip
        reals = {n: getattr(self, n) for n in ("initializer_range", "layer_norm_eps")}
        bad += [f"{n}={v!r} is not a positive number" for n, v in reals.items()
                if not is_real(v)]  # fmt: skip
        if not bad and self.hidden_size % self.num_attention_heads:
            bad.append(f"hidden_size={self.hidden_size} is not a multiple of "
                       f"num_attention_heads={self.num_attention_heads}")  # fmt: skip
        for name, allowed in (("hidden_act", ACTIVATIONS), ("task", ENDINGS),
                              ("problem_type", _PROBLEMS)):  # fmt: skip
            if (value := getattr(self, name)) not in tuple(allowed):  # it may be unhashable
                bad.append(f"{name} {value!r} is not supported, only "
                           f"{', '.join(map(repr, filter(None, allowed)))}")  # fmt: skip
        named = all(isinstance(label, str) for label in self.labels)
        if not named or not self.labels or len(set(self.labels)) < len(self.labels):
            bad.append(f"labels {list(self.labels)!r} are not one or more distinct names")
        return bad

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
        given = hf.get("architectures") or [cls.hf_name + "Model"]
        tasks = {cls.hf_name + ending: task for task, ending in ENDINGS.items()}
        bad = cls._unsupported(hf)
        if len(given) != 1 or given[0] not in tasks:
            bad.append(f"architecture {', '.join(map(str, given))!r} is not supported, only "
                       f"{', '.join(tasks)}")  # fmt: skip
        elif tasks[given[0]] == "masked-lm" and hf.get("tie_word_embeddings") is False:
            bad.append("tie_word_embeddings=false is not supported for masked-lm")
        if missing := [name for name in _SIZES if hf.get(name) is None]:
            bad.append(f"missing {', '.join(missing)}")
        labels, problem = read_labels(hf)
        if bad := bad + problem:
            raise UserError(f"{cls.hf_name} config: {'; '.join(bad)}; use another model or its "
                            "config.json")  # fmt: skip
        # A null in config.json means the default.
        known: dict[str, Any] = {f.name: hf[f.name] for f in fields(cls)
                                 if hf.get(f.name) is not None}  # fmt: skip
        known |= {"task": tasks[given[0]], "labels": labels}
        return cls(**known)

    @classmethod
    def _unsupported(cls, hf: dict[str, Any]) -> list[str]:
        """The settings of this dict that would make another model than the one here."""
        plain = {"position_embedding_type": "absolute", "is_decoder": False,
                 "add_cross_attention": False}  # fmt: skip
        return [f"{name} {hf[name]!r} is not supported, only {want!r}"
                for name, want in plain.items() if hf.get(name, want) != want]  # fmt: skip

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


@dataclass(frozen=True)
class RobertaConfig(EncoderConfig):
    """The shape of a RoBERTa, whose positions begin after ``pad_token_id``; see `EncoderConfig`."""

    hf_name: ClassVar[str] = "Roberta"
    model_type: ClassVar[str] = "roberta"

    pad_token_id: int = 1


@dataclass(frozen=True)
class XLMRobertaConfig(RobertaConfig):
    """The shape of an XLM-R: a RoBERTa of another name; see `EncoderConfig`."""

    hf_name: ClassVar[str] = "XLMRoberta"
    model_type: ClassVar[str] = "xlm-roberta"
