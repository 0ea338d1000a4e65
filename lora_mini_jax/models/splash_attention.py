"""Attention without its weights in memory, on TPUs: JAX's splash attention, a kernel in Pallas."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lora_mini_jax import hardware
from lora_mini_jax.models.masks import Seen

Array = jax.Array
BLOCKS = (512, 384, 256, 128)
"""How many queries, and keys, the kernel takes at a time: the most of these that divide a row."""
SHORTEST = 512
"""The least tokens of a row for which it is asked: the weights of shorter ones are small."""
KEPT = "splash_attention"
"""What it keeps for the backward pass, where a policy of `jax.checkpoint` chooses by name."""


def by_splash(
    q: Array, k: Array, v: Array, seen: Seen | Array, scale: float, softcap: float | None
) -> Array | None:
    """Softmax attention as `attention.attend` has it; None where there is no kernel for it.

    There is none for rows of fewer than `SHORTEST` tokens or not a multiple of 128, where there is
    a cache, and in programs for several devices of which nothing is known (`hardware.on_mesh`). On
    a mesh each device attends to its own rows and heads. Derivatives are those of reverse mode
    alone.

    Args:
        q, k, v: (batch, time, heads, width) and (batch, time, kv_heads, width).
        seen: who sees whom.
        scale: of the logits.
        softcap: of the logits, or None.
    """
    batch, time = q.shape[:2]
    if not isinstance(seen, Seen) or seen.start is not None or not hardware.takes_tpu_kernels():
        return None
    rows, ways = hardware.rows(), hardware.model_parallel()
    whole = batch % (rows.mesh.size // ways) == 0 if rows else True
    if time < SHORTEST or time % BLOCKS[-1] or k.shape[2] % ways or not whole:
        return None
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    attend = partial(_attend, windows=seen.windows, softcap=softcap)
    if rows is not None:
        of_rows = hardware.batch_axes()
        heads = PartitionSpec(of_rows, None, hardware.model_axes())
        ids = None if seen.segments is None else PartitionSpec(of_rows)
        which = None if seen.which is None else PartitionSpec()
        split = (heads, heads, heads, ids, which)
        attend = jax.shard_map(
            attend, mesh=rows.mesh, in_specs=split, out_specs=heads, check_vma=False
        )
    return attend(q, k, v, seen.segments, seen.which)


def _attend(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    which: Any,
    *,
    windows: tuple[int | None, ...],
    softcap: float | None,
) -> Array:
    """On one device, by the kernel of a window, or by one of several."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    _, time, heads, _ = q.shape
    ids = None if segments is None else SegmentIds(segments, segments)
    turned = [jnp.swapaxes(each, 1, 2) for each in (q, k, v)]

    def by(window: int | None) -> Array:
        return jax.vmap(_kernel(time, heads, window, softcap))(*turned, ids)

    ways = [partial(by, window) for window in windows]
    out = ways[0]() if which is None else jax.lax.switch(which, ways)
    return jnp.swapaxes(out, 1, 2)


def _kernel(time: int, heads: int, window: int | None, softcap: float | None) -> Any:
    """What attends in one row: to q (heads, time, width), k and v (kv_heads, time, width), ids."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in BLOCKS if time % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    shape = (time, time)
    mask = splash.CausalMask(shape)
    if window is not None:
        mask = splash.LocalMask(shape, (window - 1, 0), 0)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=KEPT,
    )
