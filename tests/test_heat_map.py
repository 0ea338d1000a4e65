"""The picture of a search: each gate's shade is in its place, and a dot on each choice."""

import re
from collections.abc import Iterator
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.colors import to_hex

from lora_mini_jax.runs.plots import heat_map

GATES = [[0.1, 0.9, None], [0.5, 0.3, 0.2]]
CHOSEN = [[False, True, None], [True, False, False]]
SVG = "{http://www.w3.org/2000/svg}"
Cell = tuple[float, float, float, float]


@pytest.fixture(scope="module")
def picture() -> ElementTree.Element:
    return ElementTree.fromstring(
        heat_map(["layers_0", "layers_1"], ["q", "k", "v"], GATES, CHOSEN)
    )


def cells(picture: ElementTree.Element) -> Iterator[tuple[Cell, str]]:
    """Left, right, top and bottom of every cell, and its colour; row by row, as they are drawn."""
    mesh = next(g for g in picture.iter(f"{SVG}g") if g.get("id", "").startswith("QuadMesh"))
    for path in mesh.iter(f"{SVG}path"):
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", path.attrib["d"])]
        xs, ys = numbers[::2], numbers[1::2]
        yield (min(xs), max(xs), min(ys), max(ys)), colour(path)


def colour(element: ElementTree.Element) -> str:
    return dict(part.split(": ") for part in element.attrib["style"].split("; "))["fill"]


def test_a_gate_is_the_darker_the_wider_it_is_and_none_has_no_shade(picture):
    blues = matplotlib.colormaps["Blues"]
    shades = [
        to_hex(blues((gate - 0.1) / 0.8)) if gate else "none" for row in GATES for gate in row
    ]
    assert [shade for _, shade in cells(picture)] == shades
    assert shades[:2] == [to_hex(blues(0.0)), to_hex(blues(1.0))]


def test_rows_go_down_and_columns_to_the_right_with_their_names(picture):
    places = [place for place, _ in cells(picture)]
    assert sorted(places, key=lambda place: (place[2], place[0])) == places
    assert len({place[2] for place in places}) == 2
    said = re.findall(
        r"<!-- (\S+) -->", heat_map(["above", "below"], ["a", "b", "c"], GATES, CHOSEN)
    )
    assert said[:5] == ["a", "b", "c", "above", "below"]


def test_a_dot_is_in_the_middle_of_every_chosen_cell_and_of_no_other(picture):
    dots = [
        (float(use.attrib["x"]), float(use.attrib["y"]))
        for use in picture.iter(f"{SVG}use")
        if is_dot(use)
    ]
    middles = [((left + right) / 2, (top + bottom) / 2)
               for left, right, top, bottom in (place for place, _ in cells(picture))]  # fmt: skip
    marks = [on for row in CHOSEN for on in row]
    wanted = [middle for middle, on in zip(middles, marks, strict=True) if on]
    assert len(dots) == len(wanted) == 2
    for dot, middle in zip(dots, wanted, strict=True):
        assert dot == pytest.approx(middle, abs=0.01)


def is_dot(use: ElementTree.Element) -> bool:
    """Whether it is one of the dots: ticks, the other marks of a picture, are black."""
    return to_hex("C1") in use.get("style", "")
