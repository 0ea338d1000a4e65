"""Attention by a GPU's own kernel: asked for where there is one, for the same numbers.

The kernel's place is taken by JAX's plain form of the same function.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_mini_jax import hardware
from lora_mini_jax.forecast.flops import dot_flops
from lora_mini_jax.models import Llama, LlamaConfig
from lora_mini_jax.models.attention import attend, init_cache
from lora_mini_jax.models.bert import Bert, BertConfig
from lora_mini_jax.models.masks import Seen
from tests.gpus import pretend

ROWS, TIME, HEADS, WIDTH = 2, 12, 4, 8
SEGMENTS = jnp.asarray([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3])
Calls = list[dict[str, Any]]


@pytest.fixture
def calls(monkeypatch) -> Calls:
    """On a machine with a Hopper GPU: how its attention was called."""
    seen: Calls = []
    plain: Any = jax.nn.dot_product_attention

    def kernel(*args: Any, **how: Any) -> jax.Array:
        if how.get("implementation") != "cudnn":
            return plain(*args, **how)
        seen.append(how)
        return plain(*args, **{**how, "implementation": "xla"})

    pretend(monkeypatch, "9.0")
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    return seen


def drawn(dtype: Any = jnp.bfloat16, time: int = TIME, width: int = WIDTH) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    shapes = [(ROWS, time, heads, width) for heads in (HEADS, HEADS // 2, HEADS // 2)]
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def seen(window: int | None = None) -> Seen:
    return Seen(SEGMENTS, SEGMENTS, windows=(window,))


def close(got: Any, want: Any) -> None:
    """To what bfloat16 leaves of numbers of this size."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    for one, other in pairs:
        a, b = (np.asarray(each, np.float32) for each in (one, other))
        np.testing.assert_allclose(a, b, rtol=2**-6, atol=0.03)


HOW: dict[str, dict[str, Any]] = {
    "causal": {},
    "segments": {"seen": seen()},
    "window, scaled": {"seen": seen(5), "scale": 0.7},
    "all see all": {"seen": jnp.ones((1, 1, TIME, TIME), bool)},
}


@pytest.mark.parametrize("how", HOW.values(), ids=list(HOW))
def test_values_and_gradients_are_those_of_plain_attention(how: dict[str, Any], calls: Calls):
    def both(*given: Any) -> Any:
        out, back = jax.vjp(lambda *given: attend(*given, **how), *given)
        return out, back(jnp.cos(out))

    got = both(*drawn())
    assert [call["is_causal"] for call in calls] == [not isinstance(how.get("seen"), jax.Array)]
    with hardware.without_kernels():
        want = both(*drawn())
    assert len(calls) == 1
    close(got, want)


def test_what_the_kernel_cannot_do_is_done_without_it(calls: Calls, monkeypatch):
    bias = jnp.zeros((1, HEADS, TIME, TIME))
    cases: list[tuple[Any, dict[str, Any]]] = [
        (drawn(jnp.float32), {}),
        (drawn(time=TIME + 1), {}),
        (drawn(width=12), {}),
        (drawn(width=136), {}),
        (drawn(), {"softcap": 30.0}),
        (drawn(), {"bias": bias}),
    ]
    for given, how in cases:
        attend(*given, **how)
    pretend(monkeypatch, "7.5")
    attend(*drawn())
    assert not calls


def test_it_is_for_the_device_that_programs_are_made_for():
    assert hardware.device() == jax.devices()[0]
    other = jax.devices()[1]
    with jax.default_device(other):
        assert hardware.device() == other
    with hardware.compiling_for(other):
        assert hardware.device() == other


def test_no_head_is_split_over_devices(calls: Calls):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))
    for axes, joined in ((("data",), 0), (("data", "tensor"), 1)):
        with hardware.on_mesh(NamedSharding(mesh, PartitionSpec(axes))):
            attend(*drawn())
        assert len(calls) == joined
    assert hardware.model_parallel() == 1


def test_training_looks_at_no_later_key_and_writing_at_the_cache(calls: Calls):
    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4)  # fmt: skip
    model, tokens = Llama(config, dtype=jnp.bfloat16), jnp.zeros((ROWS, TIME), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    calls.clear()
    for given in ((), (None, SEGMENTS), (None, None, init_cache(config, ROWS, TIME, jnp.bfloat16))):
        jax.eval_shape(lambda p, given=given: model.apply({"params": p}, tokens, *given), params)
    seen = [(call["is_causal"], call["mask"] is None) for call in calls]
    assert seen == [(True, True)] * 2 + [(True, False)] * 2 + [(False, False)] * 2


def test_encoders_have_it_too(calls: Calls):
    shape: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    model = Bert(BertConfig(**shape, hidden_size=32, intermediate_size=48), dtype=jnp.bfloat16)
    tokens = jnp.zeros((ROWS, TIME), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    calls.clear()

    def outputs() -> Any:
        return model.apply({"params": params}, tokens, attention_mask=SEGMENTS)

    got = outputs()
    assert [call["is_causal"] for call in calls] == [False] * 2
    assert calls[0]["mask"].shape == (ROWS, 1, TIME, TIME)
    with hardware.without_kernels():
        close(got, outputs())


def test_products_are_counted_as_on_any_device(calls: Calls):
    count = lambda: dot_flops(jax.make_jaxpr(attend)(*drawn()).jaxpr)  # noqa: E731
    with hardware.without_kernels():
        assert count() == 2 * 2 * ROWS * HEADS * TIME * TIME * WIDTH
    assert not calls
