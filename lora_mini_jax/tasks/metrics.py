"""What classifications and regressions are measured by, each on all held-out records at once."""

from collections.abc import Callable, Sequence

import numpy as np

LOWER_IS_BETTER = ("loss", "mse")


def better(metric: str) -> Callable[[float], float]:
    """A key by which the best value of a metric is the largest; what is no number comes last."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return lambda value: sign * value if np.isfinite(value) else -np.inf


def classification(predicted: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float]:
    """``accuracy``, ``f1`` and ``matthews``.

    F1 is that of the last class where there are two, else the mean over the classes, of which one
    that is neither there nor predicted counts 0. Matthews' coefficient is 0 where one class alone
    is predicted.

    Args:
        predicted, labels: (records,) integers from 0.
        classes: how many there are.

    Example:
        >>> classification(np.array([0, 1, 1, 1]), np.array([0, 0, 1, 1]), 2)["f1"]
        0.8
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    binary = {"average": "binary", "pos_label": 1}
    how = binary if classes == 2 else {"average": "macro", "labels": range(classes)}
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, zero_division=0, **how)),
        "matthews": float(matthews_corrcoef(labels, predicted)),
    }


def f1_is(labels: Sequence[str]) -> str:
    """Which F1 `classification` gives, in words."""
    if len(labels) == 2:
        return f"F1 is binary, that of the class {labels[1]!r}"
    return f"F1 is macro, the mean over the {len(labels)} classes"


def regression(predicted: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """``pearson``, ``spearman`` and ``mse``; a correlation that is not defined, because either
    does not vary, is 0.

    Args:
        predicted, values: (records,) floats.

    Example:
        >>> found = regression(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
        >>> round(found["spearman"], 6), round(found["mse"], 6)
        (1.0, 0.333333)
    """
    from scipy.stats import pearsonr, spearmanr

    varies = np.ptp(predicted) > 0 and np.ptp(values) > 0  # as it does in no single record
    return {
        "pearson": float(pearsonr(predicted, values)[0]) if varies else 0.0,
        "spearman": float(spearmanr(predicted, values)[0]) if varies else 0.0,
        "mse": float(np.mean((predicted - values) ** 2)),
    }
