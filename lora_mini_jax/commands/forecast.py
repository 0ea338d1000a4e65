"""The plan command: what a fine-tuning step would take, on devices that need not be there."""

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import jax

from lora_mini_jax import sharding
from lora_mini_jax.adapters.sites import methods_of
from lora_mini_jax.data import Batches
from lora_mini_jax.forecast.absent import simulated, slice_of, uncached
from lora_mini_jax.forecast.footprint import Footprint, footprint, with_shardings
from lora_mini_jax.options import PlanStep
from lora_mini_jax.runs.schedule import of_length, optimizer
from lora_mini_jax.settings.spec import to_spec
from lora_mini_jax.tasks.abstract import abstract_task
from lora_mini_jax.tasks.sites import all_targets

Report = dict[str, Any]
STEPS = 1000
"""Of the run that the step is one of; schedules have a length."""


def run_plan(options: PlanStep) -> Report:
    """Print what `plan_step` finds, and return it."""
    report = plan_step(options)
    print(json.dumps(report, indent=2) if options.json else text(report))
    return report


def plan_step(options: PlanStep) -> Report:
    """The footprint of one step of ``finetune`` with the same options, as a JSON-ready dict.

    Deep models compile in a minute with ``scan_layers``, and without it layer by layer.

    Raises:
        UserError: what `abstract_task` and `slice_of` raise, a mesh that the batch cannot be split
            over, or a TPU that has not the memory.
    """
    devices = slice_of(options.tpu, options.mesh) if options.tpu else simulated(options.mesh)
    mesh = sharding.make_mesh(options.mesh or sharding.ROWS_ALONE, devices)
    sharding.check_rows(mesh, options.batch_size // options.accumulate)
    task = abstract_task(options)
    kernels, _ = all_targets(task.model)
    if options.mesh:  # which the loss asks the parameters for
        where = sharding.of_params(mesh, task.params, kernels)
        task = replace(task, params=with_shardings(task.params, where))
    sites = of_length(task.sites, STEPS, options.parsed_settings())
    tx = optimizer(options, STEPS, sites, options.lora_plus_ratio)
    what = task.loss, tx, sites, kernels, task.params, _batch(task.train), mesh
    with uncached() if options.tpu else nullcontext():
        found = footprint(*what, has_aux=True, parts=options.accumulate)
    return {
        "model": options.model,
        "methods": [m.to_dict() for m in methods_of(sites)],
        "mesh": dict(mesh.shape),
        "devices": mesh.size,
        "compiled_for": devices[0].device_kind,
        "rows": options.batch_size,
        "length": options.max_length,
        "dtype": options.dtype,
        "remat": options.remat,
        "scan_layers": options.scan_layers,
        "trainable": sum(site.n_trainable for site in sites),
        "model_parameters": task.n_parameters,
        "bytes_per_device": {**_memory(found), "total": found.total},
        "gflop": found.flops / 1e9,
        "exchanged_bytes": found.exchanged,
    }


def text(report: Report) -> str:
    """The report for a terminal."""
    sizes = " x ".join(f"{name} {size}" for name, size in report["mesh"].items())
    lines = [
        f"model        {report['model']}, {report['model_parameters']:,} parameters",
        *(f"method       {to_spec(method)}" for method in report["methods"]),
        f"trained      {report['trainable']:,}",
        f"batch        {report['rows']} x {report['length']} tokens, {report['dtype']}"
        f", remat {report['remat']}"
        f"{', scanned layers' if report['scan_layers'] else ''}",
        f"devices      {report['devices']} ({sizes}), compiled for {report['compiled_for']}",
        f"products     {report['gflop']:,.1f} GFLOP a step, on all devices together",
        "",
        "on each device" + " " * 10 + "MiB",
    ]
    memory = report["bytes_per_device"]
    lines += [f"  {name:14}{size / 2**20:12,.1f}" for name, size in memory.items()]
    lines += ["", "exchanged a step" + " " * 8 + "MiB"]
    exchanged = report["exchanged_bytes"] or {"nothing": 0}
    lines += [f"  {name:18}{size / 2**20:8,.1f}" for name, size in exchanged.items()]
    return "\n".join(lines)


def _memory(found: Footprint) -> dict[str, int]:
    kinds = asdict(found)
    return {
        name: kinds[name] for name in ("params", "adapter", "optimizer", "batch", "temporaries")
    }


def _batch(data: Batches) -> dict[str, jax.ShapeDtypeStruct]:
    kinds = vars(data.packed)
    return {n: jax.ShapeDtypeStruct(shape, kinds[n].dtype) for n, shape in data.shapes.items()}
