"""Independent tasks, one after the other in this process or spread over others.

A task is a function of what all tasks share and of its own item. In other processes the function
must be at the top level of a module, and what is shared must be picklable; it is pickled once.
"""

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from multiprocessing import get_context
from typing import Any

import torch

from bopito_inverse.arguments import as_count

Task = Callable[[Mapping[str, Any], Any], Any]


def fan_out(
    task: Task,
    shared: Mapping[str, Any],
    items: Sequence[Any],
    what: str,
    executor: Executor | int | None = None,
    progress: bool = False,
) -> list[Any]:
    """`task(shared, item)` for each item, in order.

    Args:
        task: the function.
        shared: arguments by name, the same for all items.
        items: what differs.
        what: what an item is called in messages.
        executor: None for this process; a number for that many processes with one torch thread
            each; or anything with the interface of `concurrent.futures.Executor`.
        progress: show a progress bar.

    Raises:
        ValueError: something in `shared` cannot be sent to other processes.
        RuntimeError: names the item that failed.
    """
    payload = None if executor is None else _pickled(shared)
    with _bar(what, len(items), progress) as advance, _opened(executor) as pool:
        if pool is None:
            return [
                advance(_named(what, i, partial(task, shared, item)))
                for i, item in enumerate(items)
            ]
        results: dict[int, Any] = {}
        futures: dict[Any, int] = {}
        try:
            for i, item in enumerate(items):
                futures[pool.submit(_call, task, payload, item)] = i
            for future in as_completed(futures):
                i = futures[future]
                results[i] = advance(_named(what, i, future.result))
        except BrokenExecutor as error:
            raise RuntimeError(
                "the processes of executor died: a script must call this below "
                "`if __name__ == '__main__':`, and memory must suffice for all of them"
            ) from error
        finally:
            for future in futures:
                future.cancel()
    return [results[i] for i in range(len(items))]


def _call(task: Task, payload: bytes, item: Any) -> Any:
    return task(_unpickled(payload), item)


@lru_cache(maxsize=1)
def _unpickled(payload: bytes) -> Mapping[str, Any]:
    return pickle.loads(payload)


def _pickled(shared: Mapping[str, Any]) -> bytes:
    for name, value in shared.items():
        try:
            pickle.dumps(value)
        except Exception as error:
            raise ValueError(
                f"{name} must be picklable to be sent to other processes: take functions that are "
                f"defined at the top level of a module (no lambda), or executor=None, got {error}"
            ) from error
    return pickle.dumps(dict(shared))


def _named(what: str, i: int, run: Callable[[], Any]) -> Any:
    """The result of item i, or an error that says which item it was."""
    try:
        return run()
    except BrokenExecutor:
        raise
    except Exception as error:
        raise RuntimeError(f"{what} {i} failed: {error}") from error


def _opened(executor: Executor | int | None) -> Any:
    """The executor as a context; one that the caller opened stays open."""
    if not isinstance(executor, int):
        return nullcontext(executor)
    count = as_count("executor", executor)
    # spawned, because a forked child of a process that has used torch's threads may hang
    return ProcessPoolExecutor(count, get_context("spawn"), initializer=_one_thread)


def _one_thread() -> None:
    torch.set_num_threads(1)


@contextmanager
def _bar(what: str, n: int, progress: bool) -> Iterator[Callable[[Any], Any]]:
    """A function that counts a result and passes it through."""
    if not progress:
        yield lambda result: result
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task(what.capitalize(), total=n)

        def advance(result: Any) -> Any:
            bar.advance(task)
            return result

        yield advance
