"""Checkpoints of what training changes, through Orbax: trained leaves, optimiser, step and key.

The base model and the regenerated frozen leaves are never written. The data position is the step:
batches are a pure function of it. Each save is a new folder that appears complete or not at all,
so a kill at any moment leaves the newest complete one to go on from.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from lora_mini_jax.adapter import Adapter
from lora_mini_jax.errors import UserError
from lora_mini_jax.files import writing
from lora_mini_jax.train import TrainState


class Checkpoints:
    """The checkpoints of one run, in a folder. Use it as a context manager.

    Args:
        folder: where they are or will be.
        keep: how many of the newest to keep.

    Example:
        >>> with Checkpoints("runs/mine/checkpoints") as checkpoints:  # doctest: +SKIP
        ...     state = checkpoints.restore(state) or state
        ...     checkpoints.save(state)
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = Path(folder).resolve()
        self._args = ocp.args
        # Not in the background: a few kilobytes are written at once, and an error is raised here,
        # where it can be said in a line, and not in a thread that prints its traceback.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False
        )
        with writing(self.folder):
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with writing(self.folder):
            self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Write the state; it is there, complete, when this returns.

        Raises:
            UserError: a disk that is full or cannot be written; earlier checkpoints stay.
        """
        with writing(self.folder):
            tree = self._args.StandardSave(_saved(state))
            self._manager.save(int(state.step), args=tree, force=True)

    def restore(self, state: TrainState) -> TrainState | None:
        """The newest checkpoint in the place of ``state``'s values, or None when there is none.

        Args:
            state: a state of the same run, freshly made; gives shapes, dtypes, frozen leaves, and
                where the leaves go, be it another mesh than the one they were saved from.

        Raises:
            UserError: a checkpoint that is damaged or of another run.
        """
        step = self.latest()
        if step is None:
            return None
        abstract = jax.tree.map(_abstract, _saved(state))
        try:
            args = self._args.StandardRestore(abstract)
            tree = self._manager.restore(step, args=args)
        except Exception as error:  # Orbax and TensorStore raise a dozen kinds for a damaged file.
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(
                f"checkpoint {self.folder / str(step)} cannot be read ({type(error).__name__}: "
                f"{reason}): delete that folder to go on from the one before it, or the run folder "
                "to start again"
            ) from None
        return _restored(state, dict(tree))


def _saved(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds."""
    frozen, moving = state.adapter.frozen, {}
    for site in state.adapter.sites:
        if site.method.stored and not site.owner:
            path = site.target.path
            moving[path] = {name: frozen[path][name] for name in sorted(site.method.stored)}
    return {
        "step": state.step,
        "key": state.key,
        "trainable": state.adapter.trainable,
        "frozen": moving,
        "opt_state": jax.tree.leaves(state.opt_state),
    }


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _restored(state: TrainState, tree: dict[str, Any]) -> TrainState:
    adapter: Adapter = state.adapter.with_trainable(tree["trainable"])
    opt_state = jax.tree.unflatten(jax.tree.structure(state.opt_state), tree["opt_state"])
    moved = {path: adapter.frozen[path] | leaves for path, leaves in tree["frozen"].items()}
    adapter = replace(adapter, frozen=adapter.frozen | moved)
    return TrainState(tree["step"], adapter, opt_state, tree["key"])
