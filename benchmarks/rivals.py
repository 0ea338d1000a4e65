"""The same training step as others do it: LoRA by qwix in JAX, LoRA and MiSS by PEFT in PyTorch.

All start from the weights and tokens of `benchmarks.step`. PyTorch's rows are timed in the same
rounds; on a GPU they come compiled (``torch.compile``) as well as eager. Packages that are not
installed are left out, with a line that says so.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
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


def rivals(options: Options, model: Any, params: Any, tokens: jax.Array) -> Iterator[Any]:
    """A row for each rival that can run here."""
    if find_spec("qwix"):
        yield qwix_lora(options, model, params, tokens)
    else:
        print("qwix is not installed: its row is left out")
    if find_spec("torch") and find_spec("peft"):
        yield from peft_rows(options, model, params, tokens)
    else:
        print("torch or peft is not installed: their rows are left out")


def qwix_lora(options: Options, model: Any, params: Any, tokens: jax.Array) -> Row:
    """LoRA of the same rank on the same kernels of the same Flax model, by qwix."""
    import qwix

    provider = qwix.LoraProvider(module_path=".*_proj", rank=options.rank, alpha=16.0)
    adapted: Any = qwix.apply_lora_to_model(model, provider)
    drawn = flatten(jax.jit(adapted.init)(jax.random.key(2), tokens[:, :-1])["params"])
    trained = {path: jnp.asarray(leaf) for path, leaf in drawn.items() if "_lora_" in path}
    tx = optax.adam(1e-4)

    def loss_of(trained: Any, params: Any, tokens: jax.Array) -> jax.Array:
        joined = unflatten({**flatten(params), **trained})
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
    facts: dict[str, float]
    times: list[float] = field(default_factory=list)

    def step(self, params: Any, tokens: Any) -> None:
        """Take one step on its own copy of the weights and tokens."""
        import torch

        started = time.perf_counter()
        self.optimiser.zero_grad(set_to_none=True)
        logits = self.model(input_ids=self.tokens[:, :-1]).logits
        value = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), self.tokens[:, 1:].flatten()
        )
        value.backward()
        self.optimiser.step()
        value.item()  # waits for the device
        self.times.append(1e3 * (time.perf_counter() - started))


def peft_rows(options: Options, model: Any, params: Any, tokens: jax.Array) -> Iterator[TorchRow]:
    """PEFT's LoRA and MiSS, and full fine-tuning; each model is made when its turn comes."""
    import peft

    lora = peft.LoraConfig(r=options.rank, lora_alpha=16, target_modules=KERNELS)
    miss = peft.MissConfig(r=MISS_RANK, target_modules=KERNELS)
    for name, config in (("peft lora", lora), (f"peft miss r={MISS_RANK}", miss),
                         ("torch full", None)):  # fmt: skip
        yield from _torch_rows(name, config, options, model, params, tokens)


def _torch_rows(
    name: str, config: Any, options: Options, model: Any, params: Any, tokens: jax.Array
) -> Iterator[TorchRow]:
    import peft
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for how in ("", " compiled") if device == "cuda" else ("",):
        base = torch_model(model, params).to(device)
        adapted = peft.get_peft_model(base, config) if config else base
        weights = [p for p in adapted.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(weights, lr=1e-4)
        number = float(sum(p.numel() for p in weights))
        facts = {"trainable": number, "optimiser_bytes": 8 * number}
        ids = torch.from_numpy(np.array(tokens)).long().to(device)
        called = torch.compile(adapted) if how else adapted
        started = time.perf_counter()
        row = TorchRow(name + how, called, ids, optimiser, facts)
        row.step(params, tokens)
        facts["compile_s"] = time.perf_counter() - started if how else 0.0
        yield row


def torch_model(model: Any, params: Any) -> Any:
    """The same model in transformers: saved by `save`, read by PyTorch, in the same dtype."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save(folder, model, params)
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_cache=False)
