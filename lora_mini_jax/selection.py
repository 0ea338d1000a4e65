"""Which kernels: by a preset, a regular expression, or names; what matches nothing is an error."""

import re
from collections.abc import Callable, Iterable, Sequence

from lora_mini_jax.errors import UserError
from lora_mini_jax.layers import brief
from lora_mini_jax.tree import Target

# What "all-linear" leaves alone: output heads, by the names model authors give them.
OUTPUT_HEADS = ("lm_head", "head", "classifier", "score", "logits", "output_head")


def _names(target: Target, names: Sequence[str]) -> bool:
    return any(f"/{name}/" in f"/{target.path}/" for name in names)


PRESETS: dict[str, Callable[[Target], bool]] = {
    "all-linear": lambda t: t.kind == "linear" and not _names(t, OUTPUT_HEADS),
    "all": lambda t: True,
    "bias-only": lambda t: t.path.rpartition("/")[2] == "bias",
    "head-only": lambda t: _names(t, OUTPUT_HEADS),
}
"""Words that `select` knows."""


def select(
    targets: Iterable[Target],
    include: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
) -> tuple[Target, ...]:
    """The targets that ``include`` names and ``exclude`` does not, in their own order.

    Args:
        targets: those to choose from, as `linen.targets` lists them.
        include: one of `PRESETS`: ``"all-linear"`` (every linear kernel but the output head),
            ``"all"``, ``"bias-only"``, ``"head-only"``; or a regular expression searched for in
            the path; or a list of names, each one or more whole components of the path
            (``"q_proj"``, ``"mlp/up_proj"``).
        exclude: a regular expression or a list of names, in the same sense.

    Raises:
        UserError: a pattern or name that matches nothing, listing the kernels there are; no
            target at all.

    Example:
        >>> up, down = Target("up/kernel", (8, 32)), Target("down/kernel", (32, 8))
        >>> [t.path for t in select([up, down], "up|gate")]
        ['up/kernel']
    """
    targets = tuple(targets)
    if not targets:
        raise UserError("no kernel to choose from was given: the model has none of a known layer, "
                        "or `rules` have to say which they are")  # fmt: skip
    if not include:
        raise UserError(f"include is {include!r}: give a pattern, names or one of "
                        f"{', '.join(map(repr, PRESETS))}; {listing(targets)}")  # fmt: skip
    if isinstance(include, str) and include in PRESETS:
        chosen = [t for t in targets if PRESETS[include](t)]
        if not chosen:
            raise UserError(f"{include!r} matches no kernel; {listing(targets)}")
    else:
        chosen = [t for t in targets if matches(t, include)]
        _require_hits(targets, include)
    _require_hits(targets, exclude)
    left = tuple(t for t in chosen if not matches(t, exclude))
    if not left:
        raise UserError(f"exclude {exclude!r} leaves no kernel of those that {include!r} matches")
    return left


def matches(target: Target, pattern: str | Sequence[str]) -> bool:
    """Whether a regular expression is found in the path, or a name of a list is part of it."""
    if isinstance(pattern, str):
        try:
            return re.search(pattern, target.path) is not None
        except re.error as error:
            raise UserError(f"{pattern!r} is not a regular expression: {error}") from None
    return _names(target, pattern)


def listing(targets: Iterable[Target]) -> str:
    """The end of an error message: which kernels there are."""
    return f"the kernels are: {brief(t.path for t in targets) or 'none'}"


def _require_hits(targets: tuple[Target, ...], pattern: str | Sequence[str]) -> None:
    each = [pattern] if isinstance(pattern, str) else [[name] for name in pattern]
    dead = [p for p in each if not any(matches(t, p) for t in targets)]
    if dead:
        names = ", ".join(repr(p if isinstance(p, str) else p[0]) for p in dead)
        raise UserError(f"no kernel matches {names}; {listing(targets)}")
