"""Whether an adapter that is loaded has the base it was trained on, with errors where not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.errors import UserError
from lora_mini_jax.saved.record import Record, bits_of, fingerprint
from lora_mini_jax.saved.sketch import same, sketch
from lora_mini_jax.tree import by_name, flatten


def check_bits(record: Record, params: Mapping[str, Any], folder: Path) -> None:
    """The base is quantised as it was in training."""
    if record.quantized not in (None, bits_of(params)):
        raise UserError(
            f"{folder} was trained on a base in {record.quantized}: quantise these parameters too, "
            f"quantized.quantize(params, select(targets, 'all-linear'), '{record.quantized}'), or "
            "allow a different base"
        )


def check_base(record: Record, params: Mapping[str, Any], folder: Path) -> None:
    """Every parameter of the base is what it was in training."""
    if differs := difference(record, params):
        raise UserError(
            f"{folder} {differs}. Load the base it was trained on, or allow a different base "
            "(--allow-different-base)"
        )


def difference(record: Record, params: Mapping[str, Any]) -> str:
    """That an adapter "was trained on another base model", and in what these parameters differ from
    it; "" where a sketch tells of nothing: a change of less than a hundredth of their root mean
    square may go unseen."""
    stored, here, paths = record.fingerprint, fingerprint(params), sorted(flatten(params))
    if len(stored) != len(here):
        how = f"it had {len(stored)} parameter arrays, this one has {len(here)}"
    else:
        wrong = [p for p, a, b in zip(paths, stored, here, strict=True) if not same(a, b)]
        if not wrong:
            return ""
        how = f"{len(wrong)} of {len(here)} parameter arrays differ, the first is {wrong[0]}"
    base = f" ({record.base})" if record.base else ""
    return f"was trained on another base model{base}: {how}"


def check_drawn(digest: dict, adapter: Adapter, folder: Path, different_base: bool) -> None:
    """Frozen leaves drawn from the key must be those trained with; ones drawn from the kernel's own
    content (svd) follow the base, so with a different base only random ones can be compared."""
    here = by_name(adapter.frozen)
    near = {site.target.path: site.method.redrawn_within for site in adapter.sites}
    wrong = [
        path
        for path, stored in by_name(digest).items()
        if path not in here or not same(stored, sketch(here[path]), near[path.rpartition("/")[0]])
    ]
    if wrong:
        why = " (a different base was allowed, but these factors come from the base's own kernels)"
        raise UserError(
            f"{folder}: the frozen factors drawn here are not those it was trained with"
            f"{why if different_base else ''}: {len(wrong)} differ, the first is {wrong[0]}. "
            "Load the base as precise as it was in training (a command does without --dtype), or "
            "save the adapter again with store_outer=True where it was trained"
        )
