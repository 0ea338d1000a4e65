"""Texts that have a class or a number: the task of an encoder, with a loss row by row.

The head is trained whole beside the adapter, from where the base has it or from a fresh draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.data import (
    Labelled,
    Tokenizer,
    class_names,
    class_numbers,
    encode_labelled,
    load_tokenizer,
    numbers,
)
from lora_mini_jax.data.files import Record
from lora_mini_jax.errors import UserError
from lora_mini_jax.glue import LABEL
from lora_mini_jax.models.families import family_of_module
from lora_mini_jax.models.hub import resolve
from lora_mini_jax.options import Finetune
from lora_mini_jax.tasks.data import (
    batch_notes,
    check_ids,
    held_out_notes,
    in_batches,
    own_split,
    read_data,
    sources,
)
from lora_mini_jax.tasks.devices import reading
from lora_mini_jax.tasks.head import Head
from lora_mini_jax.tasks.initial import kept_head
from lora_mini_jax.tasks.metrics import classification, f1_is, regression
from lora_mini_jax.tasks.sites import planned_sites
from lora_mini_jax.tasks.task import Task


@dataclass(frozen=True, eq=False)
class LabelTask(Task):
    """An encoder with a head for classes or a number; what else there is, see `Task`."""

    head: Head

    @classmethod
    def read(cls, options: Finetune) -> Self:
        """See `kinds.prepare`."""
        folder = resolve(options.model)
        split = own_split(options)
        records, called = read_data(options, split), sources(options, split)
        field = options.label_field or LABEL
        named = head = named_head(options)
        if options.task == "classification" and not named.labels:
            head = replace(named, labels=class_names(records[0], field, called[0]))
        # Where an adapter brings numbers as names, they were the data's own and are no places.
        words = not all(name.removeprefix("-").isdecimal() for name in named.labels)
        module = head.module(folder)
        sites = _sites(options, module)
        tokenizer = load_tokenizer(folder)
        parts = []
        for rows, source in zip(records, called, strict=True):
            labels = _labels(head, rows, field, source, given=bool(options.labels) or words)
            parts.append(encode(rows, labels, head, module.config, tokenizer, source))
        check_rows(module, tokenizer, *(rows for rows, _ in parts))
        model, params = head.load(folder, **reading(options, module))
        train, valid = in_batches(options, *(rows for rows, _ in parts))
        notes = [*held_out_notes(options, split), *batch_notes(options, train)] + [
            f"{cut} {name} texts were cut at {options.max_length} tokens"
            for name, (_, cut) in zip(("training", "held-out"), parts, strict=True)
            if cut
        ]
        notes += [f1_is(head.labels)] if head.labels else []
        return cls(model, params, sites, train, valid, notes, head)

    @classmethod
    def planned(cls, options: Finetune) -> tuple[Site, ...]:
        """See `kinds.planned`; how many classes there are makes no difference to a plan."""
        return _sites(options, named_head(options).module(resolve(options.model)))

    @property
    def loss_name(self) -> str:
        """What the loss is, for those who read it."""
        return "mean squared error" if self.head.task == "regression" else "cross entropy, nats"

    @property
    def eval_every(self) -> int:
        """An epoch."""
        return len(self.train)

    @property
    def record(self) -> dict[str, Any]:
        """The head, its labels among what it says."""
        return self.head.to_dict()

    def summed_loss(
        self, params: Any, adapter: Adapter, batch: Any, dropout_key: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """The summed loss of a batch and the number of rows that count, float32."""
        losses = self.losses(self.logits(params, adapter, batch, dropout_key), batch)
        counted = jnp.asarray(batch["counted"])
        return jnp.where(counted, losses, 0.0).sum(), counted.sum(dtype=jnp.float32)

    def score(self, params: Any, adapter: Adapter, batch: Any) -> dict[str, Any]:
        """Logits and losses of each row, with its label and whether it counts."""
        logits = self.logits(params, adapter, batch)
        kept = {name: batch[name] for name in ("labels", "counted")}
        return {"logits": logits, "losses": self.losses(logits, batch), **kept}

    def measures(self, scores: Sequence[Any]) -> dict[str, float]:
        """``valid_loss``, the mean over the rows, and what `metrics` has for such labels."""
        whole = {n: np.concatenate([np.asarray(s[n]) for s in scores]) for n in scores[0]}
        logits, losses, labels = (
            whole[name][whole["counted"]] for name in ("logits", "losses", "labels")
        )
        if self.head.task == "regression":
            found = regression(logits[:, 0].astype(np.float64), labels.astype(np.float64))
        else:
            found = classification(logits.argmax(1), labels, len(self.head.labels))
        loss = {"valid_loss": float(np.mean(losses, dtype=np.float64))}
        return loss | {f"valid_{name}": value for name, value in found.items()}

    def losses(self, logits: jax.Array, batch: Any) -> jax.Array:
        """(rows,) float32: cross entropy in nats, or the squared distance."""
        if self.head.task == "regression":
            return (logits[:, 0] - batch["labels"]) ** 2
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])

    def logits(
        self, params: Any, adapter: Adapter, batch: Any, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """(rows, labels) float32."""
        inputs = batch["tokens"], batch["segment_ids"], batch["type_ids"]
        return self.apply(params, adapter, *inputs, dropout_key=dropout_key)


def encode(
    records: Sequence[Record],
    labels: np.ndarray,
    head: Head,
    config: Any,
    tokenizer: Tokenizer,
    source: str,
) -> tuple[Labelled, int]:
    """Records as the rows that a model of this ``config`` reads, and how many were cut."""
    return encode_labelled(
        records, tokenizer, head.text_fields, labels, max_length=head.max_length,
        pad_id=config.pad_token_id, types=config.type_vocab_size, source=source,
    )  # fmt: skip


def check_rows(module: Any, tokenizer: Tokenizer, *parts: Labelled) -> None:
    """Raise `UserError` where the rows are too long for the model, or have ids it does not know."""
    check_ids(tokenizer, module.config.vocab_size, max(int(rows.tokens.max()) for rows in parts))
    longest = max(rows.tokens.shape[1] for rows in parts)
    tokens = jax.ShapeDtypeStruct((1, longest), jnp.int32)
    try:
        jax.eval_shape(module.init, jax.random.key(0), tokens)
    except UserError as error:
        raise UserError(f"--max-length is too large: {error}") from None


def named_head(options: Finetune) -> Head:
    """The head of a run, with the classes that the options name, or else the adapter to begin from;
    without any where nobody does. It is drawn as that of such an adapter was."""
    kept = kept_head(options)
    labels, seed = options.labels, options.seed
    if kept:
        labels, seed = labels or kept.labels, kept.seed
    return Head(options.task, labels, options.text_fields, options.max_length, seed)


def _labels(
    head: Head, records: Sequence[Record], field: str, source: str, *, given: bool
) -> np.ndarray:
    if head.task == "regression":
        return numbers(records, field, source)
    return class_numbers(records, field, head.labels, source, given)


def _sites(options: Finetune, module: Any) -> tuple[Site, ...]:
    module = module.clone(scan_layers=options.scan_layers)
    return planned_sites(options, module, family_of_module(module).trunk)
