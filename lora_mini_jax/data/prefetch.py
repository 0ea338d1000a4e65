"""What is needed next is made in the background, in order, while what is there is worked on."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
AHEAD = 2
"""How many are made before they are asked for."""


@contextmanager
def prefetched(
    make: Callable[[int], T], start: int, stop: int, ahead: int = AHEAD
) -> Generator[Iterator[T]]:
    """``make(i)`` for ``i`` from ``start`` to ``stop``, made by a thread, up to ``ahead`` early.

    What ``make`` raises is raised where that ``i`` is asked for, after all before it. When the
    block ends, however it does, nothing more is made, and the thread is gone.

    Args:
        make: a pure function; it is called in order, in one other thread.
        start: the first to make.
        stop: the first not to make.
        ahead: how many to have ready, from 1.

    Example:
        >>> with prefetched(lambda i: i * i, 2, 6) as squares:
        ...     list(squares)
        [4, 9, 16, 25]
    """
    with ThreadPoolExecutor(1, "prefetch") as pool:
        try:
            yield _each(pool, make, start, stop, ahead)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _each(
    pool: ThreadPoolExecutor, make: Callable[[int], T], start: int, stop: int, ahead: int
) -> Iterator[T]:
    coming = deque[Future[T]]()
    for i in range(start, stop + ahead):
        if i < stop:
            coming.append(pool.submit(make, i))
        if i >= start + ahead:
            yield coming.popleft().result()
