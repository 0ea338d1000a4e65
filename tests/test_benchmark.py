"""The step benchmark runs, its file holds what it promises, and its arithmetic is exact.

No time is compared with another: that is for the benchmark itself to report.
"""

import json
from itertools import pairwise
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import machine, profile
from benchmarks.row import COLUMNS, Options
from benchmarks.step import main
from lora_mini_jax import UserError
from lora_mini_jax.forecast.flops import dot_flops

SIZES: dict[str, Any] = {
    "layers": 2, "width": 64, "ff": 96, "vocab": 80, "length": 16, "batch": 2, "rank": 4,
    "inner": 8, "rounds": 2,
}  # fmt: skip
SMALL = Options(**SIZES)
MORE = ["miss:rank=16", "dora:rank=2"]
SAVED = ("checkpoint_bytes", "save_ms")
NAMES = ["frozen floor", "lora-mini", "lora", *MORE, "lora-mini merged", "full"]
WHERE = {"width": 64, "length": 16, "batch": 2}


def failing() -> None:
    """A rival that cannot run."""
    raise RuntimeError("no compiler\nfor this device")


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "new" / "step.json"
    flags = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    with mock.patch("benchmarks.step.rivals", return_value={"theirs": failing}):
        main(["--quick", "--rivals", "--json", str(path), *flags, "--methods", *MORE])
    beside = {kind: path.with_suffix(kind).read_text() for kind in (".svg", ".md")}
    return json.loads(path.read_text()) | beside


@pytest.fixture(scope="module")
def rows(record):
    return {row["name"]: row for row in record["rows"] if "error" not in row}


def kernels(o: Options) -> list[tuple[int, int]]:
    """(in, out) of one layer's linear kernels."""
    return [(o.width, o.width)] * 4 + [(o.width, o.ff)] * 2 + [(o.ff, o.width)]


def times_tokens(o: Options, *sizes: int) -> int:
    """FLOPs of products of every token with kernels of these sizes."""
    return 2 * o.batch * o.length * sum(sizes)


def attention(o: Options) -> int:
    """FLOPs of one forward call's scores and weighted sums; the mask skips nothing."""
    return o.layers * 2 * times_tokens(o, o.length * o.width)


def forward(o: Options) -> int:
    linear = o.layers * times_tokens(o, *(n * m for n, m in kernels(o)))
    return linear + times_tokens(o, o.width * o.vocab) + attention(o)


def floor(o: Options) -> int:
    """Each kernel's product has one of the same size behind it but for the first layer's query, key
    and value; each of attention's has two."""
    return 2 * forward(o) + attention(o) - times_tokens(o, *[o.width**2] * 3)


def cheapest(o: Options, *widths: int) -> int:
    """FLOPs of all tokens through matrices of these widths: in turn, or multiplied first."""
    rows, sizes = o.batch * o.length, [n * m for n, m in pairwise(widths)]
    return 2 * min(rows * sum(sizes), widths[0] * (sum(sizes[1:]) + rows * widths[-1]))


def lora_mini(o: Options) -> int:
    """Forward: the input side in turn, which A's gradient needs, the output side in the cheaper
    order. Back: both sides in the cheaper order, then A and B, the latter through B_aux. In front
    of the first layer nothing is trained, so the gradient stops short of the input."""
    a = b = o.inner
    total = floor(o) - 3 * cheapest(o, o.width, a, o.rank)
    for n, m in kernels(o) * o.layers:
        there = times_tokens(o, n * a, a * o.rank) + cheapest(o, o.rank, b, m)
        back = cheapest(o, n, a, o.rank) + cheapest(o, o.rank, b, m)
        total += there + back + times_tokens(o, a * o.rank, o.rank * b, b * m)
    return total


def lora(o: Options) -> int:
    """Two thin products forward, two back, two for the trained factors."""
    thin = (3 * o.rank * (n + m) for n, m in kernels(o))
    return floor(o) + o.layers * times_tokens(o, *thin) - times_tokens(o, *[o.width * o.rank] * 3)


def miss(o: Options, rank: int = 16) -> int:
    """One thin product forward, one back, one for D; the sums of inputs are no products."""
    thin = (3 * rank * m for _, m in kernels(o))
    return floor(o) + o.layers * times_tokens(o, *thin) - times_tokens(o, *[rank * o.width] * 3)


def dora(o: Options, rank: int = 2) -> int:
    """LoRA's, and the update for its norm."""
    thin = (3 * rank * (n + m) for n, m in kernels(o))
    norms = o.layers * sum(2 * rank * n * m for n, m in kernels(o))
    return (
        floor(o)
        + o.layers * times_tokens(o, *thin)
        + norms
        - times_tokens(o, *[o.width * rank] * 3)
    )


def test_the_file_holds_what_it_promises(record):
    *ours, theirs = record["rows"]
    assert [row["name"] for row in ours] == NAMES
    assert theirs == {**WHERE, "name": "theirs", "error": "RuntimeError: no compiler"}
    for row in ours:
        unknown = SAVED if row["name"] == "frozen floor" else ()
        assert set(row) == {"name", "trained_in", *COLUMNS, *WHERE} - set(unknown)
        assert row.items() >= WHERE.items()
        assert row["trained_in"] == ("" if row["name"] == "frozen floor" else "float32")
        assert row["peak_bytes"] > row["temp_bytes"] + 4 * row["trainable"]
    assert [line.split(" | ")[0] for line in record[".md"].splitlines()[4:]] == [
        f"| {name}" for name in NAMES
    ]
    for name in (*NAMES[1:], "theirs"):
        assert f"<!-- {name} -->" in record[".svg"]
    assert record["config"].items() >= SIZES.items()
    assert record["device"]
    assert record["versions"]["jax"] == jax.__version__
    assert record["command"].startswith("python -m benchmarks.step --quick --rivals --json")


def test_a_profile_accounts_for_every_product(tmp_path):
    path, flags = tmp_path / "profile.json", [f"--{name}={size}" for name, size in SIZES.items()]
    profile.main(["--quick", "--json", str(path), *flags, "--methods"])
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == [name for name in NAMES if name not in MORE]
    for name, counted in (("frozen floor", floor(SMALL)), ("lora", lora(SMALL))):
        assert sum(rows[name]["gflop"].values()) == pytest.approx(counted / 1e9, rel=0.01)
        assert rows[name]["ms"].keys() == set(profile.SORTS)
        assert all(rows[name]["ms"][sort] > 0 for sort in rows[name]["gflop"])


def test_operations_are_told_apart():
    def step(x, wide, thin, heads):
        return jnp.sin(x @ wide).T, x @ thin, jnp.einsum("hij,hkj->hik", heads, heads)

    sizes = (256, 256), (256, 512), (256, 8), (4, 32, 16)
    shapes = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    text = jax.jit(step).lower(*shapes).compile().as_text()
    assert text
    found = profile.operations(text).values()
    products = {sort: gflop for sort, gflop in found if gflop}
    assert products["wide"] == pytest.approx(2 * 256 * 256 * 512 / 1e9)
    assert products["attention"] == pytest.approx(2 * 4 * 32 * 32 * 16 / 1e9)
    assert products["thin"] == pytest.approx(2 * 256 * 256 * 8 / 1e9)
    assert "copies" in {sort for sort, _ in found}


def test_the_default_is_the_whole_table_and_shapes_are_told_apart():
    assert {spec.partition(":")[0] for spec in Options().methods} == {"miss", "dora", "switchlora"}
    first, second = Options(shapes=("64x8x2", "128x16x1")).each()
    assert (first.width, first.length, first.batch) == (64, 8, 2)
    assert (second.width, second.length, second.batch) == (128, 16, 1)
    with pytest.raises(UserError, match="1024x512x2"):
        Options(shapes=("64x8",)).each()


def test_times_are_positive_and_ordered(rows):
    for row in rows.values():
        assert 0 < row["step_ms_q1"] <= row["step_ms"] <= row["step_ms_q3"]
        assert row["compile_s"] > 0
        assert row["temp_bytes"] > 0
        assert row["floor_ratio"] > 0
    assert rows["frozen floor"]["floor_ratio"] == 1


def test_arithmetic_is_that_of_the_formulas(rows):
    """In particular: no adapter forms a dense weight gradient, and the floor skips nothing."""
    counted = {name: round(row["dot_gflop"] * 1e9) for name, row in rows.items()}
    known: dict[str, Any] = {"frozen floor": floor, "lora-mini": lora_mini, "lora": lora}
    known |= dict(zip(MORE, (miss, dora), strict=True))
    assert {name: counted[name] for name in known} == {n: f(SMALL) for n, f in known.items()}
    assert counted["full"] == 3 * forward(SMALL)
    # Merged, the dense gradients come back, and the merge itself is added.
    dense = SMALL.layers * times_tokens(SMALL, *(n * m for n, m in kernels(SMALL)))
    assert counted["lora-mini merged"] > floor(SMALL) + dense
    assert counted["lora-mini"] < min(counted["lora-mini merged"], counted["full"])


def test_at_the_default_size_an_adapter_adds_less_than_a_tenth_to_the_floor():
    (o,) = Options().each()
    assert floor(o) < lora(o) < lora_mini(o) < 1.1 * floor(o)


def test_trainable_counts_are_the_formulas(rows):
    o = SMALL
    adapted = o.layers * len(kernels(o)) * o.rank * 2 * o.inner
    linear = o.layers * sum(n * m for n, m in kernels(o)) + o.width * o.vocab
    expected = {
        "frozen floor": 0,
        "lora-mini": adapted,
        "lora": o.layers * sum(o.rank * (n + m) for n, m in kernels(o)),
        "lora-mini merged": adapted,
        "full": linear + o.vocab * o.width + (2 * o.layers + 1) * o.width,
        "miss:rank=16": o.layers * sum(16 * m for _, m in kernels(o)),
        "dora:rank=2": o.layers * sum(2 * (n + m) + m for n, m in kernels(o)),
    }
    assert {name: row["trainable"] for name, row in rows.items()} == expected
    for name, row in rows.items():  # Adam: two float32 a parameter, and its step count
        assert row["optimiser_bytes"] == (8 * expected[name] + 4 if expected[name] else 0)


def test_dot_flops_of_products_counted_by_hand():
    x, w = jnp.ones((2, 3, 5)), jnp.ones((5, 7))
    assert dot_flops(jax.make_jaxpr(lambda x, w: x @ w)(x, w)) == 2 * (2 * 3) * 5 * 7
    batched = jax.make_jaxpr(jax.jit(lambda x: jnp.einsum("bij,bkj->bik", x, x)))(x)
    assert dot_flops(batched) == 2 * 2 * 3 * 3 * 5
    assert dot_flops(jax.make_jaxpr(jnp.sin)(x)) == 0


def test_dot_flops_counts_a_scan_by_its_length_and_a_cond_by_its_costliest_branch():
    square = jnp.ones((4, 4))

    def power(x):
        return jax.lax.scan(lambda y, _: (y @ x, None), x, length=6)[0]

    def choose(x):
        return jax.lax.cond(x[0, 0] > 0, power, lambda x: x @ x, x)

    assert dot_flops(jax.make_jaxpr(power)(square)) == 6 * 2 * 4**3
    assert dot_flops(jax.make_jaxpr(choose)(square)) == 6 * 2 * 4**3
    # Backward, every turn has two products; the first one's operand is an input as well.
    assert dot_flops(jax.make_jaxpr(jax.grad(lambda x: power(x).sum()))(square)) == 18 * 2 * 4**3


def test_dot_flops_refuses_a_while_loop_with_products():
    def forever(x):
        return jax.lax.while_loop(lambda y: y.sum() > 0, lambda y: y @ y, x)

    with pytest.raises(ValueError, match="while loop"):
        dot_flops(jax.make_jaxpr(forever)(jnp.ones((4, 4))))


def test_it_is_said_which_allocator_and_versions(record, monkeypatch):
    assert {"python", "jax", "lora_mini_jax"} <= set(record["versions"])
    assert record["allocator"] == machine.allocator()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc_minimal.so.4")
    assert machine.allocator() == {
        **record["allocator"],
        "MALLOC_ARENA_MAX": "1",
        "LD_PRELOAD": "libtcmalloc_minimal.so.4",
    }


def test_page_faults_are_those_of_new_memory():
    before = machine.page_faults()
    memory = np.ones(2**25)  # 256 MiB, in pages of at most 2
    assert machine.page_faults() - before >= memory.nbytes // 2**21
