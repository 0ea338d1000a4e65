"""Saved adapters: small, exact, never half written, and every mishap is one line that helps."""

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lora_mini_jax import (
    Adapter,
    LoRA,
    LoRAMini,
    Target,
    UserError,
    init,
    join,
    load,
    save,
    sharding,
    split,
)
from lora_mini_jax.adapters.adapter import draw
from lora_mini_jax.adapters.sites import Site, check_sites
from lora_mini_jax.methods import OLoRA, PiSSA
from lora_mini_jax.saved import storage
from lora_mini_jax.saved.rounded import as_drawn_from
from lora_mini_jax.saved.sketch import same, sketch
from lora_mini_jax.tree import flatten
from tests.cases import by_name, draws, randomised

PARAMS: Any = {
    "up": {"kernel": draws(jnp.zeros((64, 96)), 0.1, 1), "bias": jnp.zeros(96)},
    "layers": {"down": {"kernel": draws(jnp.zeros((2, 96, 64)), 0.1, 2)}},
}
OTHER = jax.tree.map(lambda x: draws(x, 0.1, 9), PARAMS)
TARGETS = (Target("up/kernel", (64, 96)), Target("layers/down/kernel", (2, 96, 64), stack=1))
METHOD = LoRAMini(rank=2, a=8, b=8)


def make(method: Any = METHOD, overrides: Any = None) -> Adapter:
    return randomised(init(PARAMS, method, TARGETS, 3, overrides=overrides))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good saved adapter, to be spoilt."""
    save(tmp_path / "good", make(), PARAMS, base="tiny")
    return tmp_path / "good"


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """The same with its frozen factors stored."""
    save(tmp_path / "full", make(), PARAMS, store_outer=True)
    return tmp_path / "full"


def same_bits(a: Any, b: Any) -> bool:
    right = by_name(b)
    return all(np.array_equal(x, right[name]) for name, x in by_name(a).items())


def edit(folder: Path, change: Callable[[dict], Any]) -> None:
    path = folder / "adapter.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def retensor(folder: Path, change: Callable[[dict], Any]) -> None:
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(folder: Path, *words: str, params: Any = PARAMS, **options: Any) -> str:
    """Loading raises one `UserError` line that names the folder and has these words in it."""
    with pytest.raises(UserError) as caught:
        load(folder, params, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("outer_init", ["normal", "fan_in", "orthogonal", "svd"])
@pytest.mark.parametrize("store_outer", [False, True])
def test_loading_gives_the_saved_bits(tmp_path, outer_init: Any, store_outer: bool):
    method = LoRAMini(rank=2, a=8, b=8, outer_init=outer_init)
    adapter = make(method, {"up": {"rank": 3, "alpha": 1.5}})
    save(tmp_path / "it", adapter, PARAMS, store_outer=store_outer)
    loaded = load(tmp_path / "it", PARAMS)
    assert loaded.sites == adapter.sites
    assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
    assert same_bits(loaded, adapter)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_trained_leaves_come_back_in_the_dtype_they_were_saved_in(tmp_path, dtype: str):
    with jax.enable_x64(True):
        adapter = make()
        changed = jax.tree.map(lambda leaf: leaf.astype(dtype), adapter.trainable)
        save(tmp_path / "it", adapter.with_trainable(changed), PARAMS)
        loaded = load(tmp_path / "it", PARAMS).trainable
        assert same_bits(loaded, changed)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded)} == {dtype}


def test_a_saved_adapter_is_small_and_holds_no_outer_factors(folder, full):
    names = load_file(folder / "adapter.safetensors")
    assert sorted(names) == [f"trainable/{t.path}/{n}" for t in TARGETS[::-1] for n in "AB"]
    size = sum(path.stat().st_size for path in folder.iterdir())
    outer = sum(x.nbytes for x in jax.tree.leaves(make().frozen))
    assert size < 8000 < outer
    assert sum(path.stat().st_size for path in full.iterdir()) > outer


def test_a_key_whose_bits_differ_between_machines_is_refused():
    with pytest.raises(UserError, match="give a seed"):
        init(PARAMS, METHOD, TARGETS, jax.random.key(0, impl="rbg"))


def test_a_folder_or_file_that_is_missing(tmp_path, folder):
    run = tmp_path / "run"
    refused(run, "is no adapter folder", "give one that finetune or")
    (run / "adapter").mkdir(parents=True)
    (run / "adapter_config.json").write_text("{}")
    refused(run, "it is PEFT's")
    (run / "adapter/adapter.json").write_text("{}")
    refused(run, f"give {run / 'adapter'}, that of this run")
    (folder / "adapter.safetensors").unlink()
    refused(folder, "adapter.safetensors")
    (folder / "adapter.json").unlink()
    refused(folder, "adapter.json")


def test_files_that_are_damaged(folder):
    tensors, record = folder / "adapter.safetensors", folder / "adapter.json"
    whole = tensors.read_bytes()
    header = b'{"A":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
    eight_bits = len(header).to_bytes(8, "little") + header + b"\0"
    for part in (whole[:-50], whole[:100], b"", b"\0" * 64, eight_bits):
        tensors.write_bytes(part)
        refused(folder, "adapter.safetensors", "damaged", "again")
    record.write_text(record.read_text()[:-20])
    refused(folder, "adapter.json", "JSON")
    record.write_bytes(b"\xff\xfe\0")
    refused(folder, "adapter.json", "UTF-8")
    record.write_text("[]")
    refused(folder, "adapter.json", "format")


def put(*path: Any) -> Callable[[dict], None]:
    """Set a field deep in the record: ``put("methods", 0, "rank", 9)``."""

    def change(record: Any) -> None:
        *way, last, value = path
        for step in way:
            record = record[step]
        record[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (put("format", 99), "99"),
        (put("methods", 0, "method", "nope"), "nope"),
        (put("methods", 0, "width", 9), "width"),
        (put("methods", 0, "rank", 0), "rank"),
        (put("methods", 0, "rank", 9), "rank"),
        (put("sites", 0, "shape", [64, 95]), "up/kernel"),
        (put("sites", 0, "path", "gone/kernel"), "gone/kernel"),
        (put("sites", 0, "method", 5), "adapter.json"),
        (put("sites", 0, "color", "red"), "adapter.json"),
        (lambda record: record.pop("key"), "key"),
        (put("key", [3, 4]), "frozen factors"),
        (put("sites", 0, "digest", "A_aux", [1.0, 2.0, 3.0]), "up/kernel/A_aux"),
        (put("base_fingerprint", 1, [1.0, 2.0, 3.0]), "up/bias"),
        (lambda record: record["base_fingerprint"].pop(), "2 parameter arrays"),
    ],
)
def test_an_edited_record(folder, change: Any, word: str):
    edit(folder, change)
    refused(folder, word)


FIELDS = ("format", "key", "methods", "sites", "base_fingerprint")


@pytest.mark.parametrize("value", [None, 5, "x", [], [1, 2, 3], {"up/kernel": 1}], ids=str)
@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_wrong_kind(folder, field: str, value: Any):
    edit(folder, put(field, value))
    refused(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [("shape", "x"), ("shape", [64]), ("ins", [7]), ("ins", []), ("stack", 9), ("stack", "x"),
     ("path", 3), ("outs", [0]), ("digest", 5), ("digest", {"A_aux": "x"}), ("method", "x")],
)  # fmt: skip
def test_a_site_that_makes_no_sense(folder, name: str, value: Any):
    edit(folder, put("sites", 0, name, value))
    refused(folder)


def test_tensors_that_do_not_fit(folder):
    a, b = (f"trainable/up/kernel/{name}" for name in "AB")
    whole = (folder / "adapter.safetensors").read_bytes()
    changes: dict[str, Callable[[dict], Any]] = {
        "(1, 2)": lambda t: t.update({a: np.zeros((1, 2), np.float32)}),
        "int32": lambda t: t.update({a: t[a].astype(np.int32)}),
        f"{b} is missing": lambda t: t.pop(b),
        "trainable/up/kernel/C": lambda t: t.update({"trainable/up/kernel/C": t[a]}),
        "elsewhere": lambda t: t.update({"elsewhere": t[a]}),
    }
    for word, change in changes.items():
        retensor(folder, change)
        refused(folder, word, "adapter.safetensors")
        (folder / "adapter.safetensors").write_bytes(whole)
    retensor(folder, lambda t: t.clear())
    message = refused(folder)
    assert message.count("is missing") == 4


def test_a_stored_outer_factor_that_is_missing_is_not_drawn_instead(full):
    retensor(full, lambda t: t.pop("frozen/up/kernel/A_aux"))
    refused(full, "frozen/up/kernel/A_aux")


def test_another_base_is_refused_unless_allowed(folder):
    refused(folder, "another base", "tiny", "allow", params=OTHER)
    assert same_bits(load(folder, OTHER, allow_different_base=True), make())


def test_factors_made_of_another_base_s_kernels_are_refused(tmp_path):
    adapter = make(LoRAMini(rank=2, a=8, b=8, outer_init="svd"))
    save(tmp_path / "svd", adapter, PARAMS)
    refused(tmp_path / "svd", "store_outer=True", params=OTHER, allow_different_base=True)
    save(tmp_path / "svd", adapter, PARAMS, store_outer=True)
    assert same_bits(load(tmp_path / "svd", OTHER, allow_different_base=True), adapter)


def test_a_model_of_other_shapes_is_refused_even_when_allowed(folder):
    narrow = {**PARAMS, "up": {"kernel": jnp.zeros((64, 90)), "bias": jnp.zeros(90)}}
    with pytest.raises(UserError, match=r"up/kernel is \(64, 90\), not \(64, 96\)"):
        load(folder, narrow, allow_different_base=True)
    with pytest.raises(UserError, match="layers/down/kernel is missing"):
        load(folder, {"up": PARAMS["up"]}, allow_different_base=True)


def test_a_bfloat16_copy_is_the_same_base(folder):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    assert same_bits(load(folder, half), make())


@pytest.mark.parametrize("method", [LoRAMini(rank=2, a=8, b=8, outer_init="svd"), PiSSA(rank=2)])
def test_factors_made_of_bfloat16_kernels_are_made_of_them_again(tmp_path, method: Any):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    adapter = init(half, method, TARGETS, 3)
    save(tmp_path / "half", adapter, half)
    assert same_bits(load(tmp_path / "half", PARAMS), adapter)


@pytest.mark.parametrize("method", [PiSSA(rank=2), OLoRA(rank=2)])
def test_a_difference_of_factors_wants_the_base_as_precise_as_it_was(tmp_path, method: Any):
    """An update of 1 % of the kernel would else be off by as much as half of itself."""
    save(tmp_path / "whole", init(PARAMS, method, TARGETS, 3), PARAMS)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(UserError, match="as precise as it was in training"):
        load(tmp_path / "whole", half)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # What safetensors itself raises on a full disk.
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
    ids=["OSError", "SafetensorError"],
)
def test_a_full_disk_leaves_what_was_there(folder, monkeypatch, error: Exception):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", fail)
        with pytest.raises(UserError, match=r"disk is full.*good"):
            save(folder, make(LoRA(rank=1)), PARAMS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]  # nothing half written lies about
    save(folder, make(LoRA(rank=1)), PARAMS)
    assert load(folder, PARAMS).sites[0].method == LoRA(rank=1)
    assert list(folder.parent.iterdir()) == [folder]


def test_a_file_in_the_way_is_kept(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UserError, match="taken"):
        save(tmp_path / "taken", make(), PARAMS)
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_sketch_bears_rounding_and_tells_arrays_apart(scale: float):
    array = scale * np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    noisy = np.nextafter(array, np.float32(np.inf))
    assert same(sketch(array), sketch(noisy))
    assert same(sketch(array), sketch(jnp.asarray(array, jnp.bfloat16)))
    others = (array.T, array[::-1], -array, 1.05 * array, np.roll(array, 1), np.zeros_like(array))
    for other in others:
        assert not same(sketch(array), sketch(other))
    assert same(sketch(np.zeros(4)), sketch(np.zeros(4)))
    assert not same(sketch(array), sketch(array)[:-1])


def test_an_owner_without_leaves_is_one_line(tmp_path):
    """As a damaged or hand-edited adapter.json may have it."""
    kernels = {f"{n}/kernel": (6, 6) for n in ("q", "v")}
    params = {n: {"kernel": jnp.ones((6, 6))} for n in ("q", "v")}
    q, v = (Site(Target(path, shape), LoRA(rank=2)) for path, shape in kernels.items())
    adapter = draw(params, (q, replace(v, owner="q/kernel")), 0)
    save(tmp_path / "one", adapter, params)
    loaded = load(tmp_path / "one", params)
    assert loaded.sites == adapter.sites
    joined, back = join(params, loaded), split(join(params, loaded), loaded)[1]
    assert "v" in joined
    assert jax.tree.structure(back) == jax.tree.structure(loaded)
    text = (tmp_path / "one" / "adapter.json").read_text()
    (tmp_path / "one" / "adapter.json").write_text(text.replace('"q/kernel"}', '"k/kernel"}'))
    with pytest.raises(UserError, match="v/kernel: uses the leaves of k/kernel, which has none"):
        load(tmp_path / "one", params)
    with pytest.raises(UserError, match="q/kernel: uses the leaves of v/kernel, which has none"):
        check_sites([replace(q, owner="v/kernel"), replace(v, owner="q/kernel")])


def test_leaves_go_where_they_are_told(folder, full):
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    for each in (folder, full):
        loaded = load(each, PARAMS, sharding=partial(sharding.of_adapter, mesh))
        assert same_bits(loaded, make())
        places = sharding.of_adapter(mesh, loaded)
        assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == places
        outer = loaded.frozen["up/kernel"]["A_aux"]
        assert outer.addressable_shards[0].data.size == outer.size // 4


def test_a_process_that_does_not_write_takes_part_and_keeps_nothing(tmp_path, monkeypatch):
    gathered, kept = [], []
    monkeypatch.setattr(storage, "writes", lambda: False)
    monkeypatch.setattr(storage, "on_host", lambda leaf: gathered.append(leaf) or np.asarray(leaf))
    monkeypatch.setattr(safetensors.numpy, "save_file", lambda tensors, file: kept.append(tensors))
    adapter = make()
    save(tmp_path / "it", adapter, PARAMS)
    wanted = [leaf for path in adapter.trainable for leaf in adapter.trainable[path].values()]
    assert [id(leaf) for leaf in gathered] == [id(leaf) for leaf in wanted]
    assert kept == [{}]


def test_kernels_are_rounded_one_by_one_and_only_where_they_have_to_be(tmp_path):
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    save(tmp_path / "it", init(small, METHOD, TARGETS), small)
    record = storage.record_of(tmp_path / "it")
    same_arrays = flatten(as_drawn_from(small, record))
    assert all(same_arrays[path] is leaf for path, leaf in flatten(small).items())
    wide: Any = flatten(as_drawn_from(PARAMS, record))
    assert wide["up/bias"] is PARAMS["up"]["bias"]
    kernel = wide["up/kernel"]
    assert not isinstance(kernel, jax.Array)
    assert (kernel.shape, kernel.dtype) == ((64, 96), jnp.bfloat16)
    np.testing.assert_array_equal(kernel.unbox(), small["up"]["kernel"])
