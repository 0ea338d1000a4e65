"""``x @ W + h @ B`` as one product, for NVIDIA's Hopper GPUs: a kernel in Pallas.

XLA runs the thin product ``h @ B`` by itself, and then reads and writes the whole output again to
add it. Here the columns of ``h`` are one more turn of the loop over the columns of ``x``: the
tensor cores add both into the same registers, and the output is written once.

Every block of threads takes tiles of the output in turn. One warpgroup copies the tiles of ``x``
and ``W`` that come next while two others multiply, each of them half a tile's columns. Experimental
as Pallas for Mosaic GPU is, this is asked for only where `fits` says so.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
ROWS, COLUMNS, DEPTH = 128, 128, 64
"""Of the output, a warpgroup's share of a tile; and how much of the depth is copied at a time."""
MULTIPLIERS = 2
TILE = MULTIPLIERS * COLUMNS
"""Columns of the output that a block of threads makes at a time."""
RANKS = (16, 32, 64)
"""How wide ``h`` may be; the least is what the tensor cores take."""
WRITTEN = 32
"""Columns of the output that are written at a time."""
_SNAKE = 8
"""Tiles side by side that are taken before the next row of them, so that they find their inputs in
the cache."""


def fits(rows: int, depth: int, columns: int, rank: int, dtype: Any) -> bool:
    """Whether ``x (rows, depth) @ W (depth, columns) + h (rows, rank) @ B`` can be one product, and
    its derivative in ``x`` too."""
    whole = rows % ROWS == depth % TILE == columns % TILE == 0
    return whole and rank <= RANKS[-1] and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)


def wide(rank: int) -> int:
    """The rank that the kernel takes for this one, with zeros beside it."""
    return next(width for width in RANKS if width >= rank)


@partial(jax.jit, static_argnames=("turned", "blocks", "interpret"))
def product_plus_thin(
    x: Array,
    w: Array,
    h: Array,
    b: Array,
    *,
    turned: bool = False,
    blocks: int,
    interpret: Any = None,
) -> Array:
    """``x @ w + h @ b``, or with ``turned`` ``x @ w.T + h @ b.T``; summed in float32.

    Args:
        x: (rows, depth).
        w: (depth, columns), or (columns, depth) where it is turned.
        h: (rows, rank), a rank of `RANKS`.
        b: (rank, columns), or (columns, rank).
        turned: whether ``w`` and ``b`` are transposed.
        blocks: how many run at a time: the device's multiprocessors.
        interpret: Pallas' interpreter for a machine without such a GPU.

    Returns:
        (rows, columns), of the dtype that all four have.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    columns = w.shape[0] if turned else w.shape[1]
    run = plgpu.kernel(
        partial(_kernel, turned=turned),
        out_type=jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=MULTIPLIERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        interpret=interpret,
    )
    return run(x, w, h, b)


def _kernel(x: Any, w: Any, h: Any, b: Any, out: Any, *, turned: bool) -> None:
    """What a block does; all arguments are in the device's memory."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    (rows, depth), columns, rank, dtype = x.shape, out.shape[1], h.shape[1], x.dtype
    tiles = rows // ROWS, columns // TILE
    me = jax.lax.axis_index("warpgroup")
    own = pl.ds(me * COLUMNS, COLUMNS)

    def part(of: Any, columns: Any, deep: Any = slice(None)) -> Any:
        """These columns of the product's right side, and so much of the depth."""
        return of.at[columns, deep] if turned else of.at[deep, columns]

    def right(columns: int, deep: int) -> tuple[int, int]:
        return (columns, deep) if turned else (deep, columns)

    def multiply(acc: Any, left: Any, right: Any) -> None:
        plgpu.wgmma(acc, left, plgpu.transpose_ref(right, (1, 0)) if turned else right)
        plgpu.wgmma_wait(0)

    def pipeline(step: Any, around: Any) -> Any:
        """A warpgroup's walk along the depth, with the copies running ahead."""
        x_block = plgpu.BlockSpec((ROWS, DEPTH), lambda k: (0, k), transforms=_swizzled(DEPTH))
        w_shape = right(TILE, DEPTH)
        w_index = (lambda k: (0, k)) if turned else (lambda k: (k, 0))
        w_block = plgpu.BlockSpec(w_shape, w_index, transforms=_swizzled(DEPTH))
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(depth // DEPTH,),
            in_specs=[x_block, w_block],
            memory_registers=40,
            num_compute_wgs=MULTIPLIERS,
            wg_axis="warpgroup",
            max_concurrent_steps=_ahead(rank),
            compute_context=around,
        )

    def nothing(*_: Any, **__: Any) -> None:
        return None

    @partial(
        pl.run_scoped,
        buffers=pipeline(nothing, nothing).get_allocations(x, w),
        h_tile=plgpu.SMEM((MULTIPLIERS, ROWS, rank), dtype, transforms=_swizzled(rank)),
        b_tile=plgpu.SMEM((MULTIPLIERS, *right(COLUMNS, rank)), dtype, transforms=_swizzled(rank)),
        written=plgpu.SMEM((MULTIPLIERS, 2, DEPTH, WRITTEN), dtype, transforms=_swizzled(WRITTEN)),
        arrived=plgpu.Barrier(num_arrivals=2, num_barriers=MULTIPLIERS),
        collective_axes="warpgroup",
    )
    def _(buffers: Any, h_tile: Any, b_tile: Any, written: Any, arrived: Any) -> None:
        @plgpu.nd_loop((math.prod(tiles),), collective_axes="block")
        def _(turn: Any) -> None:
            i, j = plgpu.planar_snake(turn.index[0], tiles, 1, _SNAKE)
            down, across = pl.ds(i * ROWS, ROWS), pl.ds(j * TILE, TILE)

            def around(walk: Any) -> None:
                @partial(pl.run_scoped, acc=plgpu.ACC((ROWS, COLUMNS), jnp.float32))
                def _(acc: Any) -> None:
                    plgpu.copy_gmem_to_smem(h.at[down], h_tile.at[me], arrived.at[me])
                    mine = part(part(b, across), own)
                    plgpu.copy_gmem_to_smem(mine, b_tile.at[me], arrived.at[me])
                    walk(acc)
                    plgpu.barrier_wait(arrived.at[me])
                    multiply(acc, h_tile.at[me], b_tile.at[me])
                    store(acc[...].astype(dtype), out.at[down, across].at[:, own])

            def store(values: Any, to: Any) -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                pieces = [(i, j) for i in range(0, ROWS, DEPTH) for j in range(0, COLUMNS, WRITTEN)]
                for turn, (i, j) in enumerate(pieces):
                    piece, slot = (slice(i, i + DEPTH), slice(j, j + WRITTEN)), turn % 2
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    written[me, slot] = values[piece]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(written.at[me, slot], to.at[piece])

            def step(_: Any, x_tile: Any, w_tile: Any, acc: Any) -> Any:
                multiply(acc, x_tile, part(w_tile, own))
                return acc

            pipeline(step, around)(x.at[down], part(w, across), allocations=buffers)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _swizzled(columns: int) -> tuple[Any, ...]:
    """How a tile of so many two-byte columns lies in shared memory, for the tensor cores."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    swizzle = plgpu.find_swizzle(16 * columns)
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)


def _ahead(rank: int) -> int:
    """How many steps of the depth are in shared memory at a time: what is left beside ``h``."""
    return 4 if rank == RANKS[0] else 3
