"""The adapter of a run's best evaluation, kept on disk while training goes on."""

from typing import Any

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.runs.folder import RunFolder
from lora_mini_jax.saved import storage
from lora_mini_jax.tasks.metrics import better
from lora_mini_jax.tasks.task import Task
from lora_mini_jax.training.train import TrainState


class Best:
    """The best so far, in the run's folder for the adapter.

    Which it is, is read from the run's metrics each time, and they go back with the checkpoint
    when a run is taken up; so nothing else has to be remembered. `update` wants to be called when
    an evaluation is in the metrics and its state in a checkpoint, and once more, with that state,
    when the run goes on from it: whenever the process is killed, the folder then holds the best
    of the evaluations up to the newest checkpoint, or is that checkpoint's to write.

    Args:
        folder: the run's.
        task: whose parameters the adapter is for.
        metric: what selects, such as ``"accuracy"``. Of equal ones the first is the best.
        base: name of the base model, for the adapter's record.
        store_outer: as for `storage.save`.
        begins_trained: whether what is found before training takes part: an adapter that the run
            begins from may be the best, a fresh one is none.
    """

    def __init__(
        self,
        folder: RunFolder,
        task: Task,
        metric: str,
        base: str,
        store_outer: bool = False,
        begins_trained: bool = False,
    ) -> None:
        self._folder, self._task, self._metric = folder, task, metric
        self._first = 0 if begins_trained else 1
        self._how: dict[str, Any] = {"base": base, "store_outer": store_outer}

    @property
    def step(self) -> int | None:
        """The step of the best evaluation; None before the first."""
        name, rank = f"valid_{self._metric}", better(self._metric)
        found = (row for row in self._folder.metrics.rows() if name in row)
        rows = [row for row in found if row["step"] >= self._first]
        return max(rows, key=lambda row: rank(row[name]))["step"] if rows else None

    def update(self, state: TrainState) -> None:
        """Write the state's adapter if its step is the best; what was there before is replaced."""
        if self.step == int(state.step):
            params, record = self._task.params, self._task.record
            storage.save(self._folder.adapter, state.adapter, params, task=record, **self._how)

    def load(self) -> Adapter:
        """The best adapter, read back."""
        return storage.load(self._folder.adapter, self._task.params)
