"""Several processes that train as one: how they meet, which of them writes, and what they share.

JAX's own engine does the work (``jax.distributed``). Every process runs the same program on its own
devices; a mesh spans them all. With one process everything here does nothing.
"""

import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NoReturn

import jax
import numpy as np

from lora_mini_jax.errors import UserError, first_line, told_of_memory

HEARTBEAT_SECONDS = 60
"""How long a process that has died goes unnoticed at most, where no exchange fails before."""
FAREWELL_SECONDS = 5
"""How long a process that ends early waits for others that end for the same reason."""


def start(coordinator: str, processes: int | None = None, process: int | None = None) -> None:
    """Join the other processes; before anything else that uses JAX.

    Args:
        coordinator: ``"auto"`` where JAX finds out by itself, which it does on TPU pods, under
            Slurm, under Open MPI and on Kubernetes; else ``"host:port"`` of process 0.
        processes: how many there are; with a ``host:port``.
        process: which of them this is, from 0; with a ``host:port``.

    Raises:
        UserError: numbers that are missing or do not fit, or others that do not come.
    """
    given: dict[str, Any] = {}
    if coordinator != "auto":
        if processes is None or process is None or not 0 <= process < processes:
            raise UserError(
                f"--coordinator {coordinator}: give --processes, how many there are, and "
                f"--process, which this is, from 0 (not {process} of {processes})"
            )
        given = {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
        }
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--coordinator {coordinator}: the processes did not meet: {first_line(error)}"
        ) from None


def together(name: str) -> None:
    """Wait until every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def on_host(tree: Any) -> Any:
    """The leaves as NumPy arrays, gathered from all processes: all of them must call it."""

    def gathered(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if not leaf.is_fully_replicated:
                from jax.experimental import multihost_utils

                return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
            return np.asarray(leaf.addressable_data(0))
        return np.asarray(leaf)

    return jax.tree.map(gathered, tree)


def shard_rows(
    shapes: Mapping[str, tuple[int, ...]],
    sharding: jax.sharding.Sharding,
    read: Callable[[slice], Mapping[str, np.ndarray]],
) -> dict[str, jax.Array]:
    """Arrays on devices, split by rows; every process reads the rows of its own devices, once each.

    Args:
        shapes: those of the whole arrays, by name.
        sharding: of all of them, along the first axis only.
        read: ``read(rows)`` gives the arrays' rows of a slice, the same in every process.
    """

    @cache
    def part(start: int | None, stop: int | None) -> Mapping[str, np.ndarray]:
        return read(slice(start, stop))

    def place(name: str) -> jax.Array:
        def own(index: Any) -> np.ndarray:
            return part(index[0].start, index[0].stop)[name]

        return jax.make_array_from_callback(shapes[name], sharding, own)

    return {name: place(name) for name in shapes}


def guarded(run: Callable[[], Any]) -> Any:
    """Run, and end this process where another has ended, or where it alone cannot go on.

    What JAX raises when another is gone differs from one exchange to the next; that it is gone is
    what the line says (exit code 75, "try again"). An orderly end would wait for those that are
    gone, and after an error of this process, such as a full disk, or an interruption of it alone,
    for those that go on: they are waited for no longer than ``FAREWELL_SECONDS``.
    """
    try:
        with told_of_memory():
            result = run()
        together("the end")  # One that still writes may take longer than JAX's shutdown waits.
        return result
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        _leave(error)


def _leave(error: BaseException) -> NoReturn:
    """End this process of several, and say why."""
    if is_of_xla(error):
        _say(
            f"process {jax.process_index()} of {jax.process_count()} lost the others "
            f"({first_line(error)}): start all of them again, and they go on from the last "
            "checkpoint"
        )
        os._exit(75)
    code = 1
    if isinstance(error, UserError):
        _say(error.line)
        code = 2
    elif isinstance(error, KeyboardInterrupt):
        _say(f"process {jax.process_index()} of {jax.process_count()} stopped: start all of them "
             "again, and they go on from the last checkpoint, if there is one")  # fmt: skip
        code = 130
    else:
        traceback.print_exception(error)
    # Where the mistake is everybody's, all come here and end in order.
    farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    farewell.start()
    farewell.join(FAREWELL_SECONDS)
    os._exit(code)


def is_of_xla(error: BaseException | None) -> bool:
    """Whether a failed exchange raised it: in XLA's own kind, or, where a program fails as it is
    started, as a ValueError whose text begins with XLA's code."""
    started = isinstance(error, ValueError) and re.match(r"[A-Z_]{5,}: ", str(error))
    return isinstance(error, jax.errors.JaxRuntimeError) or bool(started)


def _say(line: str) -> None:
    print(f"lora-mini: {line}", file=sys.stderr, flush=True)
