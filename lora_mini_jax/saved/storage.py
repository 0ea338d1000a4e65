"""A finished adapter as a folder: ``adapter.json`` and ``adapter.safetensors``.

Saved are the trained leaves, the random key, the sites with their methods, and those frozen leaves
that cannot be drawn again. The others are drawn when loading, and checked against a sketch; so is
the base model.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_mini_jax.adapters.adapter import Adapter, check_adapter, check_calibrated, draw
from lora_mini_jax.adapters.sites import check_sites
from lora_mini_jax.errors import UserError
from lora_mini_jax.files import (
    new_folder,
    read_json,
    read_safetensors,
    write_text,
    writes,
    writing,
)
from lora_mini_jax.method import Factors
from lora_mini_jax.processes import on_host, together
from lora_mini_jax.saved.record import Record, read_record, to_text
from lora_mini_jax.saved.rounded import as_drawn_from
from lora_mini_jax.saved.same_base import check_base, check_bits, check_drawn
from lora_mini_jax.tree import by_name

GROUPS = ("trainable", "frozen")


def save(
    folder: str | Path,
    adapter: Adapter,
    params: Mapping[str, Any],
    *,
    store_outer: bool = False,
    base: str = "",
    task: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter to a folder, whole or not at all; an adapter there before is replaced.

    Args:
        folder: where to; made if need be.
        adapter: what to save.
        params: the base parameters, of which a fingerprint is kept.
        store_outer: keep the frozen leaves too, instead of drawing them again when loading.
        base: a name or path of the base model, for whoever reads the file.
        task: what it was trained for, as JSON; kept for `record_of`.

    Raises:
        UserError: a disk that is full, a folder that cannot be written or holds something else;
            something else in the adapter's place; factors that come from data and have not been
            made yet.

    Example:
        >>> import tempfile
        >>> from lora_mini_jax import LoRA, Target, init
        >>> params = {"up": {"kernel": jnp.ones((8, 32))}}
        >>> adapter = init(params, LoRA(rank=2), [Target("up/kernel", (8, 32))])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/mine", adapter, params)
        ...     sorted(path.name for path in Path(folder, "mine").iterdir())
        ['adapter.json', 'adapter.safetensors']
    """
    from safetensors.numpy import save_file

    check_adapter(adapter)
    check_calibrated(adapter)
    stored = _stored(adapter, store_outer)
    # All processes take part in gathering a leaf, and only the one that writes keeps it.
    every = ((f"{group}/{path}", on_host(leaf)) for group in GROUPS
             for path, leaf in by_name(stored[group]).items())  # fmt: skip
    tensors = {name: leaf for name, leaf in every if writes()}
    drawn_again = _drawn_again(adapter, stored["frozen"])
    text = to_text(adapter, params, drawn_again=drawn_again, base=base, task=task)
    with new_folder(folder) as temporary:
        with writing(folder):
            save_file(tensors, temporary / "adapter.safetensors")
        write_text(temporary / "adapter.json", text)
    together("adapter saved")


def load(
    folder: str | Path,
    params: Mapping[str, Any],
    *,
    allow_different_base: bool = False,
    sharding: Callable[[Adapter], Adapter] | None = None,
) -> Adapter:
    """Read an adapter back, for the base model it was trained on.

    Args:
        folder: what `save` wrote.
        params: the base parameters, arrays.
        allow_different_base: go on when the base is not the one the adapter was trained on; every
            shape must fit all the same.
        sharding: where the leaves go on a mesh, ``partial(sharding.of_adapter, mesh)``: what makes
            of an adapter one whose leaves are shardings. No leaf is then ever whole on one device.

    Raises:
        UserError: a folder or file that is missing, damaged or of another format; kernels that do
            not fit; another base model, or one that is not quantised as it was in training; frozen
            leaves that this machine draws differently.

    Example:
        >>> import tempfile
        >>> from lora_mini_jax import LoRA, Target, init
        >>> params = {"up": {"kernel": jnp.ones((8, 32))}}
        >>> adapter = init(params, LoRA(rank=2), [Target("up/kernel", (8, 32))])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/mine", adapter, params)
        ...     load(f"{folder}/mine", params).sites == adapter.sites
        True
    """
    folder, record = Path(folder), record_of(folder)
    try:
        check_sites(record.sites, new=False)
        kernels = as_drawn_from(params, record)
        again = partial(draw, sites=record.sites, key=record.key)
        places = sharding(jax.eval_shape(again, kernels)) if sharding else None
        drawn = again(kernels, places=places)  # checks every shape
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if not allow_different_base:
        check_bits(record, params, folder)
        check_base(record, params, folder)
    tensors = read_safetensors(folder / "adapter.safetensors", "copy or save the adapter again")
    adapter = _fill(drawn, tensors, record.digests, folder)
    adapter = jax.device_put(adapter, places) if places else jax.tree.map(jnp.asarray, adapter)
    check_drawn(record.digests, adapter, folder, allow_different_base)
    return adapter


def record_of(folder: str | Path) -> Record:
    """What ``adapter.json`` says, the ``task`` and the ``base`` that `save` was given among it;
    errors as in `load`."""
    folder = Path(folder)
    if not (folder / "adapter.json").exists():
        hints = {
            "adapter/adapter.json": f"give {folder / 'adapter'}, that of this run",
            "adapter_config.json": "it is PEFT's, which lora_mini_jax.peft.load reads",
            "": "give one that finetune or lora_mini_jax.save wrote",
        }
        hint = next((say for name, say in hints.items() if (folder / name).exists()), hints[""])
        raise UserError(f"{folder} is no adapter folder, it has no adapter.json: {hint}")
    return read_record(read_json(folder / "adapter.json"), folder)


def _stored(adapter: Adapter, store_outer: bool) -> dict[str, dict[str, Factors]]:
    """The leaves that go into the file."""
    frozen = adapter.without_scratch(adapter.frozen if store_outer else adapter.kept())
    return {"trainable": adapter.trainable, "frozen": frozen}


def _drawn_again(adapter: Adapter, saved: dict[str, Factors]) -> dict[str, Factors]:
    """The frozen leaves that are not in the file and that an adapter's function depends on."""
    return {
        path: {name: leaf for name, leaf in leaves.items() if name not in saved.get(path, ())}
        for path, leaves in adapter.without_scratch(adapter.frozen).items()
    }


def _fits(group: str, expected: Any, tensor: np.ndarray) -> bool:
    """Whether a leaf may have its dtype: trained ones may have been made narrower, or wider."""
    real = group == "trainable" and jnp.issubdtype(tensor.dtype, jnp.floating)
    return real or expected.dtype == tensor.dtype


def _fill(drawn: Adapter, tensors: dict[str, np.ndarray], digests: dict, folder: Path) -> Adapter:
    """The drawn adapter with the leaves of the file in their places; every misfit in one error.

    A frozen leaf without a digest must be in the file: nothing would vouch for a drawn one. Only
    what training alone needs may be missing from both."""
    groups = {"trainable": by_name(drawn.trainable), "frozen": by_name(drawn.frozen)}
    wrong, filled = [], set()
    for name, tensor in tensors.items():
        group, _, path = name.partition("/")
        expected = groups.get(group, {}).get(path)
        if expected is None or expected.shape != tensor.shape or not _fits(group, expected, tensor):
            want = "nothing" if expected is None else f"{expected.shape} {expected.dtype}"
            wrong.append(f"{name} is {tensor.shape} {tensor.dtype}, expected {want}")
        else:
            groups[group][path] = tensor
            filled.add(name)
    scratch = {f"{site.target.path}/{name}" for site in drawn.sites for name in site.method.scratch}
    vouched = {f"frozen/{path}" for path in {*by_name(digests), *scratch}}
    expected = {f"{group}/{path}" for group, flat in groups.items() for path in flat}
    wrong += [f"{name} is missing" for name in sorted(expected - filled - vouched)]
    if wrong:
        raise UserError(f"{folder}/adapter.safetensors does not fit: {'; '.join(wrong)}")
    leaves = {
        group: {
            path: {name: flat[f"{path}/{name}"] for name in factors}
            for path, factors in getattr(drawn, group).items()
        }
        for group, flat in groups.items()
    }
    return replace(drawn, **leaves)
