"""The same training step as others do it: LoRA by qwix in JAX, LoRA and MiSS by PEFT in PyTorch.

All start from the weights and tokens of `benchmarks.step`. PyTorch's rows are timed in the same
rounds; on a GPU they come compiled (``torch.compile``) as well as eager. Packages that are not
installed are left out, with a line that says so.
"""

import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.row import Options, Row, compiled, loss
from lora_mini_jax.models.saving import save
from lora_mini_jax.tree import flatten, unflatten

KERNELS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MISS_RANK = 64
COMPILED = " compiled"
Make = Callable[[], Any]
"""Makes a row: compiles it, and takes its first step."""


def rivals(options: Options, model: Any, params: Any, tokens: jax.Array) -> dict[str, Make]:
    """What makes the row of each rival that can run here, by its name."""
    found: dict[str, Make] = {}
    given = options, model, params, tokens
    if find_spec("qwix"):
        found["qwix lora"] = partial(qwix_lora, *given)
    else:
        print("qwix is not installed: its row is left out")
    if find_spec("torch") and find_spec("peft"):
        found |= peft_rows(*given)
    else:
        print("torch or peft is not installed: their rows are left out")
    return found


def qwix_lora(options: Options, model: Any, params: Any, tokens: jax.Array) -> Row:
    """LoRA of the same rank on the same kernels of the same Flax model, by qwix."""
    import qwix

    provider = qwix.LoraProvider(module_path=".*_proj", rank=options.rank, alpha=16.0)
    adapted: Any = qwix.apply_lora_to_model(model, provider)
    drawn = flatten(jax.jit(adapted.init)(jax.random.key(2), tokens[:, :-1])["params"])
    trained = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in drawn.items()
               if "_lora_" in path}  # fmt: skip
    tx = optax.adam(1e-4)

    def loss_of(trained: Any, params: Any, tokens: jax.Array) -> jax.Array:
        cast = jax.tree.map(lambda leaf: leaf.astype(options.dtype), trained)  # as ours are
        joined = unflatten({**flatten(params), **cast})
        return loss(adapted.apply({"params": joined}, tokens[:, :-1]), tokens)

    def step(state: Any, params: Any, tokens: jax.Array) -> tuple[Any, Any]:
        trained, moments = state
        value, grads = jax.value_and_grad(loss_of)(trained, params, tokens)
        updates, moments = tx.update(grads, moments, trained)
        return (optax.apply_updates(trained, updates), moments), value

    state = (trained, tx.init(trained))
    return compiled("qwix lora", jax.jit(step, donate_argnums=0), (state, params, tokens), *state)


@dataclass
class TorchRow:
    """A PyTorch model and its optimiser, stepped like a `Row`."""

    name: str
    model: Any
    tokens: Any
    optimiser: Any
    facts: dict[str, Any]
    dtype: Any
    times: list[float] = field(default_factory=list)

    def step(self, params: Any, tokens: Any) -> None:
        """Take one step on its own copy of the weights and tokens."""
        import torch

        started = time.perf_counter()
        self.optimiser.zero_grad(set_to_none=True)
        narrow = self.dtype != torch.float32
        with torch.autocast(self.tokens.device.type, self.dtype, enabled=narrow):
            logits = self.model(input_ids=self.tokens[:, :-1]).logits
        value = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), self.tokens[:, 1:].flatten()
        )
        value.backward()
        self.optimiser.step()
        value.item()  # waits for the device
        self.times.append(1e3 * (time.perf_counter() - started))


def peft_rows(
    options: Options, model: Any, params: Any, tokens: jax.Array
) -> dict[str, Callable[[], TorchRow]]:
    """PEFT's LoRA and MiSS, and full fine-tuning; each model is made when its turn comes."""
    import peft
    import torch

    lora = peft.LoraConfig(r=options.rank, lora_alpha=16, target_modules=KERNELS)
    miss = peft.MissConfig(r=MISS_RANK, target_modules=KERNELS)
    ways = {"peft lora": lora, f"peft miss r={MISS_RANK}": miss, "torch full": None}
    return {
        name + how: partial(_torch_row, name + how, config, options, model, params, tokens)
        for name, config in ways.items()
        for how in (("", COMPILED) if torch.cuda.is_available() else ("",))
    }


def _torch_row(
    name: str, config: Any, options: Options, model: Any, params: Any, tokens: jax.Array
) -> TorchRow:
    """One row; the first step, in which it is compiled, is taken."""
    import peft
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    base = torch_model(model, params).to(device)
    # What is trained is float32 in every row, and computed with in ``dtype``.
    adapted = peft.get_peft_model(base, config) if config else base.float()
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(weights, lr=1e-4)
    ids = torch.from_numpy(np.array(tokens)).long().to(device)
    called = torch.compile(adapted) if name.endswith(COMPILED) else adapted
    row = TorchRow(name, called, ids, optimiser, {}, dtype)
    started = time.perf_counter()
    row.step(params, tokens)
    if name.endswith(COMPILED):
        row.facts["compile_s"] = time.perf_counter() - started
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - _held(adapted, optimiser)
        row.step(params, tokens)
        row.facts["peak_bytes"] = torch.cuda.max_memory_allocated() - others
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in weights})
    row.facts |= {
        "trainable": sum(p.numel() for p in weights),
        "trained_in": " ".join(kinds),
        "optimiser_bytes": _bytes(_state(optimiser)),
    }
    return row


def _state(optimiser: Any) -> list[Any]:
    return [t for own in optimiser.state.values() for t in own.values() if hasattr(t, "numel")]


def _held(model: Any, optimiser: Any) -> int:
    """Bytes that a row holds between its steps, on its device."""
    there = [t for t in _state(optimiser) if t.is_cuda]
    return _bytes([*model.parameters(), *model.buffers(), *there])


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def torch_model(model: Any, params: Any) -> Any:
    """The same model in transformers: saved by `save`, read by PyTorch, in the same dtype."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save(folder, model, params)
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_cache=False)
