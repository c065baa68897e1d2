"""Work done in threads while the caller does something else: in order, and only a few items ahead."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar('Item')
Result = TypeVar('Result')


@contextmanager
def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int = 1, ahead: int = 1
) -> Iterator[Iterator[Result]]:
    """Yield an iterator over ``function(item)`` in the order of ``items``, computed while the caller uses the last one.

    ``items`` is iterated in the caller's thread. The end of the block waits for the calls that have begun, so that an
    exception or Ctrl-C leaves none running.

    Args:
        function: its exceptions are raised where its result is due.
        items: read as needed, so that at most ``ahead`` results or calls wait beside the one that is used.
        threads: number of threads; with one, calls do not overlap each other.
        ahead: number of items to begin before the result of the first is used.
    """
    pending: deque[Future[Result]] = deque()

    def results() -> Iterator[Result]:
        for item in items:
            pending.append(pool.submit(function, item))
            del item  # it may be large, and the next one takes a while
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    with ThreadPoolExecutor(threads) as pool:
        yield results()
