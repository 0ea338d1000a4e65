"""What a report says of how its runs were trained."""

import re
from typing import Any

from lora_mini_jax.options import Compare, Finetune
from lora_mini_jax.runs.outcome import Outcome
from lora_mini_jax.runs.settings_page import settings_html

SUMMARY: dict[str, Any] = {"steps": 12, "model": "a model", "notes": []}


def outcome(options: Finetune, **found: Any) -> Outcome:
    settings = [options.adapter_method().to_dict()]
    return Outcome(options, {**SUMMARY, "settings": settings, **found})


def rows(page: str) -> list[list[str]]:
    """The cells of the tables, line by line."""
    lines = re.findall("<tr>(.*?)</tr>", page)
    return [re.findall("<t[dh]>(.*?)</t[dh]>", line) for line in lines]


def test_a_run_is_told_by_its_spec_and_its_options():
    given = Finetune(method="lora", settings=("rank=2",), data="d.jsonl", weight_decay=0.5,
                     max_steps=12, output_dir="other", separator="\t", packing=False)  # fmt: skip
    page = settings_html({"lora": [outcome(given, notes=["one was cut"])]})
    assert "<p>lora: lora:rank=2,alpha=16.0,rslora=false,dropout=0.0, 12 steps on a model." in page
    assert " one was cut.</p>" in page
    assert rows(page) == [
        ["option", "value"], ["data", "d.jsonl"], ["valid", "not given"], ["learning rate", "0.01"],
        ["schedule", "linear"], ["warmup ratio", "0.05"], ["batch size", "8"],
        ["max length", "256"], ["max steps", "12"], ["seed", "0"], ["weight decay", "0.5"],
        ["separator", "&#x27;\\t&#x27;"], ["packing", "no"],
    ]  # fmt: skip


def test_runs_that_differ_are_told_apart():
    specs = ("lora:rank=2", "lora:rank=2,learning_rate=0.5,weight_decay=0.25")
    given = Compare(data="d.jsonl", methods=specs, seeds=(0, 4))
    runs = {s: [outcome(given.run_options(s, seed)) for seed in (0, 4)] for s in specs}
    found = rows(settings_html(runs))
    assert ["seed", "0, 4"] in found
    assert ["epochs", "2.0"] in found
    assert found[-3:] == [
        ["method", "learning rate", "weight decay"],
        [specs[0], "0.01", "0.0"],
        [specs[1], "0.5", "0.25"],
    ]
    assert "learning rate" not in [row[0] for row in found]


def test_a_run_that_diverged_says_so_and_a_search_what_it_chose():
    given = Finetune(method="lora", settings=("rank=2",))
    page = settings_html({"lora": [Outcome(given, {}, diverged=3)]})
    assert "lora: lora:rank=2," in page
    assert "dropout=0.0. Seed 0 diverged at step 3." in page
    search = Finetune(method="diffora", settings=("inner=lora",))
    page = settings_html({"it": [outcome(search, settings=[{"method": "lora", "rank": 8}])]})
    assert "it: diffora:inner=lora(rank=8," in page
    assert ", which chose lora:rank=8, 12 steps on a model." in page
