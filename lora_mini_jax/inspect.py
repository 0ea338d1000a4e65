"""What an adapter would be, before anything is trained: kernels, parameters, memory, FLOPs.

Only the model's config is read; arrays are shapes and nothing is computed.
"""

from dataclasses import MISSING, fields
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from lora_mini_jax import linen
from lora_mini_jax.adapter import Adapter, draw
from lora_mini_jax.data import token_loss
from lora_mini_jax.flops import dot_flops
from lora_mini_jax.methods import METHODS
from lora_mini_jax.models.hub import load_module
from lora_mini_jax.options import Inspect
from lora_mini_jax.plan import Site
from lora_mini_jax.task import planned_sites
from lora_mini_jax.train import TrainState, make_train_step

Report = dict[str, Any]


def inspect(options: Inspect) -> Report:
    """The plan as a JSON-ready dict: a list of ``kernels``, and the totals.

    Raises:
        UserError: a model that cannot be read, or kernels that the method cannot adapt.
    """
    model = load_module(options.model)
    sites = planned_sites(options, model)
    tokens = jax.ShapeDtypeStruct((options.batch_size, options.max_length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    adapter = jax.eval_shape(lambda p: draw(p, sites, 0), params)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    trainable = sum(leaf.size for leaf in jax.tree.leaves(adapter.trainable))
    step = adapter_flops(model, params, adapter, tokens)
    full = full_flops(model, params, tokens)
    return {
        "model": options.model,
        "methods": [m.to_dict() for m in dict.fromkeys(site.method for site in sites)],
        "kernels": [kernel(site, adapter) for site in sites],
        "model_parameters": total,
        "trainable": trainable,
        "trainable_share": trainable / total,
        "frozen_outer": sum(leaf.size for leaf in jax.tree.leaves(adapter.frozen)),
        "frozen_saved": sum(_saved(site, adapter) for site in sites),
        "optimizer_bytes": optimizer_bytes(adapter.trainable),
        "full_optimizer_bytes": optimizer_bytes(params),
        "step_gflop": step / 1e9,
        "full_step_gflop": full / 1e9,
        "tokens_per_step": tokens.size,
    }


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


def _saved(site: Site, adapter: Adapter) -> int:
    """Numbers of a kernel's frozen leaves that a saved adapter holds."""
    leaves, method = adapter.frozen[site.target.path], site.method
    return sum(leaves[name].size for name in method.stored - method.scratch)


def _sizes(site: Site) -> Report:
    """The method's whole numbers: rank, a, b and the like."""
    return {n: v for n, v in site.method.to_dict().items() if type(v) is int}


def optimizer_bytes(trained: Any) -> int:
    """Bytes of Adam's state for these leaves in float32."""
    state = jax.eval_shape(optax.adam(1e-3).init, trained)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def adapter_flops(model: nn.Module, params: Any, adapter: Adapter, tokens: Any) -> int:
    """FLOPs of the matrix products of one training step with the adapter."""
    apply, tx = linen.adapt(model), optax.adam(1e-3)
    step = make_train_step(
        lambda p, a, batch, key: mean_loss(apply(p, a, batch["tokens"]), batch), tx
    )
    state = jax.eval_shape(lambda a: TrainState.create(a, tx), adapter)
    return dot_flops(jax.make_jaxpr(step)(state, params, _batch(tokens)))


def full_flops(model: nn.Module, params: Any, tokens: Any) -> int:
    """FLOPs of the matrix products of one step that trains every parameter."""

    def loss(p: Any, batch: Any) -> Any:
        return mean_loss(model.apply({"params": p}, batch["tokens"]), batch)

    return dot_flops(jax.make_jaxpr(jax.grad(loss))(params, _batch(tokens)))


def mean_loss(logits: Any, batch: Any) -> Any:
    """Mean loss over the tokens that count."""
    total, number = token_loss(logits, batch)
    return total / number


def _batch(tokens: Any) -> dict[str, Any]:
    return {"tokens": tokens, "loss_mask": jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)}


def methods_text() -> str:
    """Every method with what it is, its settings and their defaults, for a terminal."""
    lines = []
    for name, method in METHODS.items():
        defaults = {f.name: "" if f.default is MISSING else f" {f.default}" for f in fields(method)}
        flags = [f"--{n.replace('_', '-')}{defaults[n]}" for n in method.field_names()]
        summary = (method.__doc__ or "").partition("\n")[0].replace("``", "")
        lines += [f"{name}: {summary}", f"    {'  '.join(flags)}"]
    return "\n".join(lines)


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
    ratio, tokens = report["step_gflop"] / report["full_step_gflop"], report["tokens_per_step"]
    lines += [
        "",
        *(f"method            {method}" for method in report["methods"]),
        f"kernels           {len(report['kernels'])}",
        f"trained           {report['trainable']:,} of {total:,} ({share:.3%})",
        f"frozen outer      {report['frozen_outer']:,} (saved with the adapter: "
        f"{report['frozen_saved']:,}; the others are drawn again from the key)",
        f"optimizer state   {report['optimizer_bytes']:,} bytes "
        f"(full fine-tuning: {report['full_optimizer_bytes']:,})",
        f"products a step   {report['step_gflop']:.2f} GFLOP at {tokens:,} tokens "
        f"(full fine-tuning: {report['full_step_gflop']:.2f}; {ratio:.2f} of it)",
    ]
    return "\n".join(lines)
