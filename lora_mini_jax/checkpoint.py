"""Checkpoints of what training changes, through Orbax: trained leaves, optimiser, step and key.

The base model and the regenerated frozen leaves are never written. The data position is the step:
batches are a pure function of it. Each save is a new folder that appears complete or not at all,
so a kill at any moment leaves the newest complete one to go on from. Training does not wait for
the disk: a save copies the state to the host's memory, and one thread of ours writes it.
"""

import logging
import sys
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.errors import UserError, first_line
from lora_mini_jax.files import is_address, writes, writing
from lora_mini_jax.processes import is_of_xla, together
from lora_mini_jax.training.train import TrainState


class Checkpoints:
    """The checkpoints of one run, in a folder. Use it as a context manager: it waits at its end
    until what was saved is on the disk.

    Args:
        folder: where they are or will be.
        keep: how many of the newest to keep.

    Raises:
        UserError: an address, or a folder that cannot be made; at the end, what `wait` raises.

    Example:
        >>> with Checkpoints("runs/mine/checkpoints") as checkpoints:  # doctest: +SKIP
        ...     state = checkpoints.restore(state) or state
        ...     checkpoints.save(state)
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if is_address(folder):
            raise UserError(f"{folder} is an address: keep checkpoints in a folder on this machine")
        self.folder = Path(folder).resolve()
        with writing(self.folder):
            if writes():
                self.folder.mkdir(parents=True, exist_ok=True)
            together("checkpoint folder made")
            self._manager = _manager(self.folder, keep)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None
        self._open = ExitStack()

    def __enter__(self) -> "Checkpoints":
        self._open.enter_context(_errors_left_to_us())
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._open:
            if jax.process_count() > 1 and is_of_xla(error):
                return  # Another process is lost, and what is pending may be waiting for it.
            try:
                self.wait()
            except UserError:
                if error is None:  # What went wrong first is what there is to say.
                    raise
            finally:
                self._writer.shutdown()
                self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Begin to write the state, which may be donated when this returns; `wait` for the end.

        Raises:
            UserError: as `wait`; the save before this one is waited for.
        """
        self.wait()
        step, tree = int(state.step), _on_host(_saved(state))
        self._pending = self._writer.submit(self._write, step, tree)

    def wait(self) -> None:
        """Wait until the state that was saved last is there, complete.

        Raises:
            UserError: a disk that is full or cannot be written; earlier checkpoints stay.
        """
        pending, self._pending = self._pending, None
        if pending:
            with writing(self.folder):
                pending.result()

    def restore(self, state: TrainState) -> TrainState | None:
        """The newest checkpoint in the place of ``state``'s values, or None when there is none.

        Args:
            state: a state of the same run, freshly made; gives shapes, dtypes, frozen leaves, and
                where the leaves go, be it another mesh than the one they were saved from.

        Raises:
            UserError: a checkpoint that is damaged or of another run; what `wait` raises.
        """
        import orbax.checkpoint as ocp

        self.wait()
        step = self.latest()
        if step is None:
            return None
        abstract = jax.tree.map(_abstract, _saved(state))
        try:
            how = ocp.checkpoint_utils.construct_restore_args(abstract)
            tree = self._manager.restore(step, args=ocp.args.PyTreeRestore(abstract, how))
        except Exception as error:  # Orbax and TensorStore raise a dozen kinds for a damaged file.
            raise UserError(
                f"checkpoint {self.folder / str(step)} cannot be read ({type(error).__name__}: "
                f"{first_line(error)}): delete that folder to go on from the one before it, or the "
                "run folder to start again"
            ) from None
        return _restored(state, dict(tree))

    def _write(self, step: int, tree: Any) -> None:
        import orbax.checkpoint as ocp

        self._manager.save(step, args=ocp.args.PyTreeSave(tree), force=True)


@contextmanager
def _errors_left_to_us() -> Generator[None]:
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


def _manager(folder: Path, keep: int) -> Any:
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


def _on_host(tree: Any) -> Any:
    """A copy in the host's memory, sharded as it is; it need not be there when this returns."""
    places = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("pinned_host"), tree)
    return jax.device_put(tree, places)


def _saved(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {
        "step": state.step,
        "key": state.key,
        "trainable": state.adapter.trainable,
        "frozen": state.adapter.kept(),
        "opt_state": jax.tree.leaves(state.opt_state),
    }


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _restored(state: TrainState, tree: dict[str, Any]) -> TrainState:
    adapter: Adapter = state.adapter.with_trainable(tree["trainable"])
    opt_state = jax.tree.unflatten(jax.tree.structure(state.opt_state), tree["opt_state"])
    adapter = adapter.with_kept(tree["frozen"])
    return TrainState(tree["step"], adapter, opt_state, tree["key"])
