"""What Orbax needs to store the states of several processes, without a word and without delay."""

import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax


@contextmanager
def errors_left_to_us() -> Generator[None]:
    """Orbax logs the errors that it raises, and what TensorStore still says into the event loop of
    a write that has failed already can be raised to nobody: either would print a traceback."""
    logger, before = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def unraisable(what: Any) -> None:
        if str(what.exc_value) != "Event loop is closed":
            before(what)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = before


def orbax_manager(folder: Path, keep: int) -> Any:
    """Orbax's, to be called from one thread at a time, whichever it is.

    It is not asynchronous itself: it would copy the state while training waits, one leaf after the
    other. With the processes named, they meet through JAX's coordination service; otherwise through
    an exchange of the devices, which must not come between those of the training step.
    """
    import orbax.checkpoint as ocp

    every = ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=False,  # Orbax cannot, where the processes are named
        enable_async_checkpointing=False,
        multiprocessing_options=every,
    )
    # Of equal replicas the first is written, whole: to take slices of them is work for devices.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, multiprocessing_options=every
    )
    return ocp.CheckpointManager(folder, options=options, item_handlers=handler)


def copied_to_host(tree: Any) -> Any:
    """A copy in the host's memory, sharded as it is; it need not be there when this returns."""
    places = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("pinned_host"), tree)
    return jax.device_put(tree, places)
