"""Work on items ahead of their use, in threads: decoders of images release Python's lock."""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

AHEAD, TOGETHER = 16, 4
"""Images that each thread of `run_ahead` may have ready, and those that it is given at once."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_ahead(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[tuple[int, Result | ValueError]]:
    """(index, result) of every item, in order; a ValueError that was raised stands in place of its result.

    workers: threads that work ahead, up to `AHEAD` items each; decoders of images release Python's lock. 0: none.
    """

    def guarded(item: Item) -> Result | ValueError:
        try:
            return work(item)
        except ValueError as error:
            return error

    if workers <= 0:
        yield from enumerate(map(guarded, items))
        return
    with closing(_lists_ahead(guarded, iter(items), workers)) as lists:
        yield from enumerate(itertools.chain.from_iterable(lists))


def _lists_ahead(
    work: Callable[[Item], Result], items: Iterator[Item], workers: int
) -> Generator[list[Result], None, None]:
    """Results in lists of `TOGETHER`: to hand over an image by itself takes longer than to use it."""
    with ThreadPoolExecutor(workers, "tokenizers_mm read ahead") as pool:
        waiting: deque[Future[list[Result]]] = deque()
        try:
            while given := list(itertools.islice(items, TOGETHER)):
                waiting.append(pool.submit(lambda given: [work(item) for item in given], given))
                if len(waiting) * TOGETHER > AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
