"""What the pictures say in words."""

import re

from lora_mini_jax.runs.plots import loss_against, loss_curves


def words(svg: str) -> list[str]:
    """The texts of a picture: matplotlib leaves each as a comment beside its outlines."""
    return re.findall(r"<!-- (.*?) -->", svg)


def test_axes_are_named_after_what_is_drawn_and_runs_are_in_the_legend():
    curves = {"lora": ([1, 2], [3.0, 2.0]), "miss": ([1, 2], [3.0, 2.5])}
    found = words(loss_curves(curves, curves, "accuracy"))
    assert {"accuracy; dots: held out", "lora", "miss", "step"} <= set(found)
    found = words(loss_against("trained parameters", curves, 4.0, "held-out accuracy"))
    assert {"held-out accuracy", "trained parameters", "lora", "miss"} <= set(found)


def test_pictures_on_one_page_share_no_name_and_know_their_own():
    curves = {"lora": ([1, 2], [3.0, 2.0])}
    pictures = [loss_curves(curves, curves, "loss"), loss_curves(curves, {}, "accuracy"),
                loss_against("trained parameters", curves, 4.0)]  # fmt: skip
    found: list[str] = []
    for picture in pictures:
        own = re.findall(r'\bid="(.*?)"', picture)
        used = re.findall(r'href="#(.*?)"|url\(#(.*?)\)', picture)
        assert {a or b for a, b in used} <= set(own)
        assert used
        found += own
    assert len(found) == len(set(found))


def test_the_steps_of_a_search_are_called_so():
    whole = {"lora": ([1, 2], [3.0, 2.0])}
    search = {**whole, "searched": ([-4, -1, 2], [3.0, 2.5, 2.0])}
    said = "step; below 0, shaded: of the search"
    assert said in words(loss_curves(search, {}))
    assert said in words(loss_curves(whole, {"searched": ([-4, 2], [3.0, 2.5])}))
    assert said not in words(loss_curves(whole, {"none": ([], [])}))
