"""The pictures of the experiments: outliers are written at the edge, and stretch nothing."""

import re

from experiments.compare_plot import RESULTS, limits, picture
from lora_mini_jax.files import read_json


def test_what_lies_far_from_the_bulk_does_not_stretch_the_axis():
    bulk = [(1.0 + 0.1 * i, 0.05) for i in range(6)]
    low, high = limits([*bulk, (9.0, 0.1), (-7.0, 0.1)])
    assert (low, high) == limits(bulk)
    assert 0.8 < low < 0.95
    assert 1.55 < high < 1.7


def test_every_method_has_a_row_and_an_outlier_its_number():
    found = read_json(RESULTS / "compare_e2e.json")
    said = [text.strip() for text in re.findall("<!--(.*?)-->", picture(found))]
    names = [arm.split(":")[0] for arm in found["bases"]["pretrained"]]
    assert sum(text.split(" ")[0] in names for text in said) == len(names) == 20
    assert [text for text in said if "±" in text] == ["← 1.045 ± 0.001", "3.252 ± 0.010 →"]
    assert "15,296 to 15,600" in said, "of three seeds"
