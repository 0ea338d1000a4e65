"""Checkpoints of what training changes, through Orbax: trained leaves, optimiser, step and key.

The base model and the regenerated frozen leaves are never written. The data position is the step:
batches are a pure function of it. Each save is a new folder that appears complete or not at all,
so a kill at any moment leaves the newest complete one to go on from. Training does not wait for
the disk: a save copies the state to the host's memory, and one thread of ours writes it.
"""

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
from lora_mini_jax.training.identity import differences, identity
from lora_mini_jax.training.storing import copied_to_host, errors_left_to_us, orbax_manager
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
            self._manager = orbax_manager(self.folder, keep)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None
        self._run: dict[str, Any] | None = None  # whose checkpoints are here, once it is known
        self._open = ExitStack()

    def __enter__(self) -> "Checkpoints":
        self._open.enter_context(errors_left_to_us())
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
            UserError: as `wait`, for the save before this one is waited for; a folder with
                checkpoints of another run, which new ones would push out.
        """
        self.wait()
        run = self._checked(state)
        step, tree = int(state.step), copied_to_host(_saved(state))
        self._pending = self._writer.submit(self._write, step, tree, run)

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
                where the leaves go, be it another mesh than the one they were saved from. The base
                parameters are for you to keep: a state does not hold them.

        Raises:
            UserError: a checkpoint that is damaged, or of another run: another key, other methods,
                settings or kernels, another optimiser; what `wait` raises.
        """
        import orbax.checkpoint as ocp

        self.wait()
        step = self.latest()
        if step is None:
            return None
        self._checked(state)
        abstract = jax.tree.map(_abstract, _saved(state))
        with self._reading(step):
            how = ocp.checkpoint_utils.construct_restore_args(abstract)
            tree = self._manager.restore(step, args=ocp.args.PyTreeRestore(abstract, how))
        return _restored(state, dict(tree))

    @contextmanager
    def _reading(self, step: int) -> Generator[None]:
        """Turn what Orbax and TensorStore raise for a damaged file, a dozen kinds of errors, into a
        `UserError`."""
        try:
            yield
        except Exception as error:
            raise UserError(
                f"checkpoint {self.folder / str(step)} cannot be read ({type(error).__name__}: "
                f"{first_line(error)}): delete that folder to go on from the one before it, or the "
                "run folder to start again"
            ) from None

    def _checked(self, state: TrainState) -> dict[str, Any]:
        """The `identity` of a state; `UserError` where the newest checkpoint is of another run."""
        run, step = identity(state), self.latest()
        if run != self._run and step is not None:
            with self._reading(step):
                said = self._manager.metadata(step).custom_metadata
            if said and (wrong := differences(said, run)):
                raise UserError(f"checkpoint {self.folder / str(step)} is of another run: "
                                f"{'; '.join(wrong)}. Give the adapter and the optimiser that it "
                                "was saved with, or another folder")  # fmt: skip
        self._run = run
        return run

    def _write(self, step: int, tree: Any, run: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        self._manager.save(step, args=ocp.args.PyTreeSave(tree), custom_metadata=run, force=True)


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
