"""Sizes for a number of trained parameters: as many as fit, on every kernel, and no more."""

import json
from typing import Any

import pytest

from lora_mini_jax import LoRA, LoRAMini, Target, UserError
from lora_mini_jax.adapters.budget import within
from lora_mini_jax.cli import main
from lora_mini_jax.methods import (
    AdaLoRA,
    DiffoRA,
    DoRA,
    Full,
    LoRAMiniDiag,
    LoRAXS,
    MiSS,
    SwitchLoRA,
    VeRA,
)
from tests.runs import write_model

TARGETS = tuple(
    Target(f"layers_{i}/{name}/kernel", shape)
    for i in range(2)
    for name, shape in {"q": (64, 64), "k": (64, 16), "up": (64, 160), "down": (160, 64)}.items()
)


@pytest.mark.parametrize(
    "method",
    [LoRA(), DoRA(), LoRAXS(), VeRA(), MiSS(), MiSS(mode="mini", mini_rank=4), MiSS(mode="bat"),
     LoRAMiniDiag(), LoRAMini(rank=2), LoRAMini(rank=2, outer_init="svd"), AdaLoRA(total_steps=100),
     DiffoRA(inner=LoRA()), SwitchLoRA()],
    ids=lambda m: f"{m.name}-{getattr(m, 'mode', getattr(m, 'outer_init', ''))}",
)  # fmt: skip
@pytest.mark.parametrize("budget", [1_100, 2_345, 6_000])
def test_the_largest_size_that_fits(method: Any, budget: int):
    counts = []
    for size in range(1, 161):
        sized = [(method.sized(size, t.n_in, t.n_out), t) for t in TARGETS]
        if not any(own.problems(t.n_in, t.n_out) for own, t in sized):
            counts.append(sum(own.n_trainable(t.n_in, t.n_out) for own, t in sized))
    if budget < counts[0]:
        with pytest.raises(UserError, match=f"at least {counts[0]:,}"):
            within(method, TARGETS, budget)
        return
    sites = within(method, TARGETS, budget)
    assert [site.target for site in sites] == list(TARGETS)
    assert sum(site.n_trainable for site in sites) == max(n for n in counts if n <= budget)


def test_a_size_is_that_of_the_inner_method_and_of_what_is_left_of_the_rank():
    gated: Any = DiffoRA(inner=LoRA(rank=8)).sized(3, 64, 64)
    assert gated.inner.rank == 3
    pruned: Any = AdaLoRA(rank=6, target_rank=4).sized(5, 64, 64)
    assert (pruned.rank, pruned.target_rank) == (5, 4)
    assert AdaLoRA().sized(4, 64, 64) == AdaLoRA(rank=4, target_rank=3)


def test_vera_s_kernels_share_a_rank_that_may_exceed_their_sides():
    sites: Any = within(VeRA(), TARGETS, 1_500)
    assert {site.method.rank for site in sites} == {(1_500 - 608) // 8}  # of 608 outputs


@pytest.mark.parametrize(("budget", "rank"), [(1_100, 2), (90_000, 20)])
def test_lora_mini_gets_a_rank_in_proportion_and_is_cut_where_a_kernel_is_narrow(budget, rank):
    sites: Any = within(LoRAMini(), TARGETS, budget)
    methods = {site.target.path: site.method for site in sites}
    wide, narrow = methods["layers_0/q/kernel"], methods["layers_1/k/kernel"]
    assert wide.rank == rank
    assert (narrow.a, narrow.b, narrow.rank) == (wide.a, 16, min(16, rank))
    assert wide.a == wide.b == (64 if rank == 20 else 8 * rank + wide.a % 8)
    within_it = sum(site.n_trainable for site in sites)
    assert 0.8 * min(budget, within_it) <= within_it <= budget


def test_a_narrow_kernel_does_not_hold_the_others_back():
    targets = (Target("a", (64, 64)), Target("b", (64, 8)), Target("c", (64, 160)))
    sites: Any = within(LoRA(), targets, 10**6)
    assert [site.method.rank for site in sites] == [64, 8, 64]


def test_a_method_without_a_size_is_refused():
    with pytest.raises(UserError, match="full has no size"):
        within(Full(), TARGETS, 1000)


def test_inspect_proposes_sizes_for_a_budget(tmp_path, capsys):
    model = str(write_model(tmp_path / "model"))
    main(["inspect", "--model", model, "--method", "lora-mini", "--budget", "600", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert 450 < report["trainable"] <= 600
    assert all(k["settings"]["rank"] == 2 and k["settings"]["a"] > 16 for k in report["kernels"])
    with pytest.raises(SystemExit):
        main(["inspect", "--model", model, "--method", "lora", "--budget", "10"])
    assert "lora cannot train as few as 10 parameters" in capsys.readouterr().err
