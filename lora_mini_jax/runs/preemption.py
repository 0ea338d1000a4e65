"""Runs that are asked to end: a preempted machine, ``scancel`` and ``kubectl delete`` send SIGTERM
and leave some seconds, in which what was learned since the last checkpoint can be saved."""

import itertools
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

import jax

EXIT_CODE = 128 + signal.SIGTERM
"""As of a process that the signal ended."""
_calls = itertools.count(1)  # of all runs: JAX wants numbers that rise, the same in every process


@contextmanager
def notices() -> Generator[Callable[[], bool]]:
    """For the length of a loop, what tells after each of its steps whether to save and end.

    With several processes, a notice to one of them is for all: JAX agrees on a step that none has
    passed. Outside of the main thread, where Python hears no signals, there are no notices.
    """
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        yield lambda: reached_preemption_sync_point(next(_calls))
        return
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
