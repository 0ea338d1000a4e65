"""The numbers that classifications and regressions are measured by, against their formulas."""

import math

import numpy as np
import pytest

from lora_mini_jax.tasks.metrics import better, classification, f1_is, regression

GUESSES, TRUTH = np.array([0, 1, 1, 1, 0, 1]), np.array([0, 0, 1, 1, 1, 1])


def f1(label):
    guessed, true = np.equal(GUESSES, label), np.equal(TRUTH, label)
    return 2 * np.sum(guessed & true) / (np.sum(guessed) + np.sum(true))


def test_two_classes_have_the_f1_of_the_last():
    found = classification(GUESSES, TRUTH, 2)
    tp, tn, fp, fn = 3, 1, 1, 1
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found == pytest.approx({"accuracy": 4 / 6, "f1": f1(1), "matthews": matthews})
    assert f1_is(("no", "yes")) == "F1 is binary, that of the class 'yes'"


def test_more_classes_have_the_mean_over_all_of_them():
    found = classification(GUESSES, TRUTH, 3)
    assert found["f1"] == pytest.approx((f1(0) + f1(1) + 0) / 3)
    assert "macro" in f1_is("abc")


def test_one_class_for_everything_is_worth_nothing():
    found = classification(np.zeros(4, int), np.array([0, 1, 1, 1]), 2)
    assert found == {"accuracy": 0.25, "f1": 0.0, "matthews": 0.0}


def test_correlations_and_the_squared_distance():
    x, y = np.array([0.0, 1.0, 2.0, 10.0]), np.array([1.0, 3.0, 2.0, 4.0])
    found = regression(x, y)
    ranks = np.corrcoef([0, 1, 2, 3], [0, 2, 1, 3])[0, 1]
    wanted = {"pearson": np.corrcoef(x, y)[0, 1], "spearman": ranks, "mse": np.mean((x - y) ** 2)}
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("predicted", [np.ones(3), np.ones(1)])
def test_a_correlation_with_what_does_not_vary_is_0(predicted):
    found = regression(predicted, np.arange(len(predicted), dtype=float))
    assert (found["pearson"], found["spearman"]) == (0.0, 0.0)


def test_better_knows_which_way():
    assert max([0.2, 0.9, math.nan], key=better("f1")) == 0.9
    assert max([math.nan, 0.2, 0.9], key=better("loss")) == 0.2
