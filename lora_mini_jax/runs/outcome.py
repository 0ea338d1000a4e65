"""What came of each run of a comparison: it was finished, or its loss diverged."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lora_mini_jax.options import Training
from lora_mini_jax.runs.folder import Row


class Outcome(NamedTuple):
    """One run: what was asked for, and what was found or where it diverged.

    Attributes:
        options: the run's.
        summary: of a finished run; empty for one that diverged.
        metrics: the lines of its metrics.jsonl.
        diverged: the step at which a loss was not finite; None for a finished run.
    """

    options: Training
    summary: Row
    metrics: Sequence[Row] = ()
    diverged: int | None = None


def finished(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Those that came to their end."""
    return [each for each in outcomes if each.diverged is None]


def diverged_at(step: int) -> str:
    """Where a run diverged; in the metrics a search's steps are below 0.

    Example:
        >>> diverged_at(3), diverged_at(-2)
        ('diverged at step 3', 'diverged in the search')
    """
    return f"diverged at step {step}" if step >= 0 else "diverged in the search"


def diverged_runs(runs: Mapping[str, Iterable[Outcome]]) -> list[str]:
    """``lora, seed 0: diverged at step 3`` for each of ``{name: outcomes}`` that did."""
    return [
        f"{name}, seed {each.options.seed}: {diverged_at(each.diverged)}"
        for name, outcomes in runs.items()
        for each in outcomes
        if each.diverged is not None
    ]
