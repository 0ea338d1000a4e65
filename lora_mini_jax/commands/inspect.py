"""What an adapter would be, before anything is trained: kernels, parameters, memory, FLOPs.

Only the model's config is read; arrays are shapes and nothing is computed.
"""

import json
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from lora_mini_jax import linen
from lora_mini_jax.adapters.adapter import Adapter, draw
from lora_mini_jax.adapters.sites import Site, methods_of
from lora_mini_jax.forecast.flops import dot_flops
from lora_mini_jax.hardware import without_kernels
from lora_mini_jax.layers import first
from lora_mini_jax.models.families import family_of_module
from lora_mini_jax.models.hub import load_module
from lora_mini_jax.options import Inspect
from lora_mini_jax.settings.spec import to_spec
from lora_mini_jax.tasks.language import check_length
from lora_mini_jax.tasks.sites import all_targets, sites_among
from lora_mini_jax.training.train import TrainState, make_train_step

Report = dict[str, Any]
LENGTH = 256
"""Tokens in a row where nobody says."""


def run_inspect(options: Inspect) -> None:
    """Print what an adapter would be; errors as in `inspect`."""
    report = inspect(options)
    print(json.dumps(report, indent=2) if options.json else text(report))


def inspect(options: Inspect) -> Report:
    """The plan as a JSON-ready dict: a list of ``kernels``, and the totals.

    Of an encoder, all is without its head: that is a task's, and trained whole.

    Raises:
        UserError: a model that cannot be read, or kernels that the method cannot adapt.
    """
    model = without_head(load_module(options.model))
    sites = planned_sites(options, model)
    params = family_of_module(model).shapes(model)
    adapter = jax.eval_shape(lambda p: draw(p, sites, 0), params)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    trainable = sum(leaf.size for leaf in jax.tree.leaves(adapter.trainable))
    stored = jax.tree.leaves(adapter.without_scratch(adapter.kept()))
    report = {
        "model": options.model,
        "methods": [m.to_dict() for m in methods_of(sites)],
        "kernels": [kernel(site, adapter) for site in sites],
        "model_parameters": total,
        "trainable": trainable,
        "trainable_share": trainable / total,
        "frozen_outer": sum(leaf.size for leaf in jax.tree.leaves(adapter.frozen)),
        "frozen_saved": sum(leaf.size for leaf in stored),
        "adapter_bytes": _bytes((adapter.trainable, stored)),
        "optimizer_bytes": optimizer_bytes(adapter.trainable),
        "full_optimizer_bytes": optimizer_bytes(params),
    }
    if options.config_only:
        return report
    length = row_length(options.max_length, model)
    inputs = [
        jax.ShapeDtypeStruct((options.batch_size, length), one.dtype)
        for one in family_of_module(model).inputs()
    ]
    return report | {
        "step_gflop": adapter_flops(model, params, adapter, inputs) / 1e9,
        "full_step_gflop": full_flops(model, params, inputs) / 1e9,
        "tokens_per_step": sum(one.size for one in inputs),
    }


def row_length(asked: int | None, model: Any) -> int:
    """Tokens in a row: those asked for, or as many as are usual and fit the model.

    Raises:
        UserError: more than a decoder has positions for; an encoder says so itself.
    """
    config = model.config
    ends = hasattr(config, "max_position_embeddings")  # a T5's positions do not
    if asked is None:
        return min(LENGTH, config.max_position_embeddings) if ends else LENGTH
    if ends and family_of_module(model).kind != "encoder":
        check_length(asked, config)
    return asked


def without_head(model: Any) -> Any:
    """An encoder without the head that its ``config.json`` names; every other model as it is."""
    if family_of_module(model).kind != "encoder":
        return model
    return model.clone(config=replace(model.config, task=None))


def planned_sites(options: Inspect, model: nn.Module) -> tuple[Site, ...]:
    """Which method adapts which kernel; of an encoder, of those that are below any head."""
    trunk = family_of_module(model).trunk
    kernels, everything = (
        [t for t in each if not trunk or first(t.path) in trunk] for each in all_targets(model)
    )
    return sites_among(options, kernels, everything)


def kernel(site: Site, adapter: Adapter) -> Report:
    """One adapted kernel."""
    path = site.target.path
    return {
        "path": path,
        "shape": list(site.target.shape),
        "trained": sum(leaf.size for leaf in adapter.trainable[path].values()),
        "frozen": sum(leaf.size for leaf in adapter.frozen[path].values()),
        "settings": _sizes(site),
    }


def _sizes(site: Site) -> Report:
    """The method's whole numbers: rank, a, b and the like."""
    return {n: v for n, v in site.method.to_dict().items() if type(v) is int}


def optimizer_bytes(trained: Any) -> int:
    """Bytes of Adam's state for these leaves in float32."""
    return _bytes(jax.eval_shape(optax.adam(1e-3).init, trained))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def adapter_flops(model: nn.Module, params: Any, adapter: Adapter, inputs: Any) -> int:
    """FLOPs of the matrix products of one training step with the adapter."""
    apply, tx = linen.adapt(model), optax.adam(1e-3)
    step = make_train_step(lambda p, a, batch, key: some_loss(apply(p, a, *batch)), tx)
    state = jax.eval_shape(lambda a: TrainState.create(a, tx), adapter)
    with without_kernels():
        return dot_flops(jax.make_jaxpr(step)(state, params, inputs))


def full_flops(model: nn.Module, params: Any, inputs: Any) -> int:
    """FLOPs of the matrix products of one step that trains every parameter."""

    def loss(p: Any, *given: Any) -> Any:
        return some_loss(model.apply({"params": p}, *given))

    with without_kernels():
        return dot_flops(jax.make_jaxpr(jax.grad(loss))(params, *inputs))


def some_loss(outputs: Any) -> Any:
    """A number that depends on all outputs. A real loss has no matrix products either."""
    return sum(jnp.mean(leaf) for leaf in jax.tree.leaves(outputs))


def text(report: Report) -> str:
    """The report for a terminal."""
    width = max(len(k["path"]) for k in report["kernels"])
    lines = [f"{'kernel':{width}}  {'shape':>16}  {'trained':>9}  {'frozen':>9}  sizes"]
    for k in report["kernels"]:
        shape = " x ".join(map(str, k["shape"]))
        sizes = " ".join(f"{name}={size}" for name, size in k["settings"].items())
        lines.append(
            f"{k['path']:{width}}  {shape:>16}  {k['trained']:>9,}  {k['frozen']:>9,}  {sizes}"
        )
    share, total = report["trainable_share"], report["model_parameters"]
    lines += [
        "",
        *(f"method            {to_spec(method)}" for method in report["methods"]),
        f"kernels           {len(report['kernels'])}",
        f"trained           {report['trainable']:,} of {total:,} ({share:.3%})",
        f"frozen outer      {report['frozen_outer']:,} (saved with the adapter: "
        f"{report['frozen_saved']:,}; the others are drawn again from the key)",
        f"saved adapter     {report['adapter_bytes']:,} bytes of float32 numbers",
        f"optimizer state   {report['optimizer_bytes']:,} bytes "
        f"(full fine-tuning: {report['full_optimizer_bytes']:,})",
    ]
    if "step_gflop" in report:
        step, full = report["step_gflop"], report["full_step_gflop"]
        lines.append(f"products a step   {step:.2f} GFLOP at {report['tokens_per_step']:,} tokens "
                     f"(full fine-tuning: {full:.2f}; {step / full:.2f} of it)")  # fmt: skip
    return "\n".join(lines)
