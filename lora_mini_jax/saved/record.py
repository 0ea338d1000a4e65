"""What ``adapter.json`` says: format, base model, random key, methods, sites, and digests."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.adapters.sites import Site, methods_of
from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Factors, Method
from lora_mini_jax.methods import from_dict
from lora_mini_jax.processes import on_host
from lora_mini_jax.saved.sketch import sketch
from lora_mini_jax.tree import Target, flatten

FORMAT = 1


def to_text(
    adapter: Adapter,
    params: Mapping[str, Any],
    *,
    drawn_again: dict[str, Factors],
    base: str,
    task: Mapping[str, Any] | None = None,
) -> str:
    """The file's text: a line an entry, not a line a number, so that it is small and readable.

    ``drawn_again`` are the frozen leaves that are not saved; a digest of each is.
    """
    methods = methods_of(adapter.sites)
    flat = flatten(params)
    dtype = jnp.result_type(*{flat[site.target.path].dtype for site in adapter.sites}).name
    record = {
        "format": FORMAT,
        "base": base,
        **({} if dtype == "float32" else {"dtype": dtype}),
        **({} if (bits := bits_of(params)) is None else {"quantized": bits}),
        **({} if task is None else {"task": dict(task)}),
        "key": on_host(adapter.key).tolist(),
        "methods": [method.to_dict() for method in methods],
        "sites": [
            _site_record(site, methods, drawn_again.get(site.target.path, {}))
            for site in adapter.sites
        ],
        "base_fingerprint": fingerprint(params),
    }
    lines = [f"{json.dumps(name)}: {_compact(value)}" for name, value in record.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def bits_of(params: Mapping[str, Any]) -> str | None:
    """How the kernels among the parameters are quantised (`quantized.Bits`); None for dense."""
    return next((leaf.bits for leaf in flatten(params).values() if hasattr(leaf, "bits")), None)


class Record(NamedTuple):
    """What `read_record` finds; ``digests`` by path and leaf, ``dtype`` of the base's kernels, and
    how they were ``quantized``, if they were."""

    base: str
    key: jax.Array
    sites: tuple[Site, ...]
    digests: dict[str, dict[str, list[float]]]
    fingerprint: list[list[float]]
    dtype: str
    quantized: Any
    task: dict[str, Any] | None


def read_record(record: Any, folder: Path) -> Record:
    """``adapter.json`` read and checked, whatever is wrong with it being one line."""
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{folder}/adapter.json has format {found!r}: this version reads {FORMAT}")
    needed = ("key", "methods", "sites", "base", "base_fingerprint")
    if missing := [name for name in needed if name not in record]:
        raise UserError(f"{folder}/adapter.json lacks {', '.join(missing)}: save the adapter again")
    try:
        methods = [from_dict(method) for method in record["methods"]]
        sites = tuple(_site(site, methods) for site in record["sites"])
        key = np.asarray(record["key"], np.uint32)
        marks = [[float(number) for number in mark] for mark in record["base_fingerprint"]]
        if key.shape != (2,) or not all(marks):
            raise ValueError("key or base_fingerprint is of the wrong shape")
        digests = {site["path"]: dict(site.get("digest", {})) for site in record["sites"]}
        task = None if record.get("task") is None else dict(record["task"])
        dtype = jnp.dtype(record.get("dtype", "float32")).name
        bits, key = record.get("quantized"), jnp.asarray(key)
        return Record(str(record["base"]), key, sites, digests, marks, dtype, bits, task)
    except (TypeError, KeyError, IndexError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{folder}/adapter.json is damaged: {error}") from None


def _site(record: dict[str, Any], methods: list[Method]) -> Site:
    """One site of ``adapter.json``; ValueError for what is no target."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in record.items()
        if name not in ("method", "digest", "owner")
    }
    target = Target(**values)
    axes = sorted((*target.batch, *target.ins, *target.outs))
    whole = [*target.shape, target.stack, *axes]
    if not isinstance(target.path, str) or not all(type(number) is int for number in whole):
        raise ValueError(f"a site with path {target.path!r} and sizes {whole}")
    if target.kind != "array" and not (target.ins and target.outs):
        raise ValueError(f"{target.path} has no rows or no columns")
    if axes != list(range(len(target.shape) - target.stack)):
        raise ValueError(f"the axes of {target.path} do not fit its shape {target.shape}")
    return Site(target, methods[record["method"]], str(record.get("owner", "")))


def fingerprint(params: Mapping[str, Any]) -> list[list[float]]:
    """A sketch of every parameter, in the order of the paths: tells one base from another."""
    return [sketch(leaf) for _, leaf in sorted(flatten(params).items())]


def _site_record(site: Site, methods: list[Method], drawn_again: Factors) -> dict[str, Any]:
    """One site: what of its target is not the default, its method, and the digests."""
    target = {f.name: getattr(site.target, f.name) for f in fields(Target)
              if getattr(site.target, f.name) != f.default}  # fmt: skip
    digest = {name: sketch(leaf) for name, leaf in drawn_again.items()}
    digests = {"digest": digest} if digest else {}
    owner = {"owner": site.owner} if site.owner else {}
    return {**target, "method": methods.index(site.method), **owner, **digests}


def _compact(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], list | dict):
        return "[\n" + ",\n".join(json.dumps(v, separators=(",", ":")) for v in value) + "\n]"
    return json.dumps(value)
