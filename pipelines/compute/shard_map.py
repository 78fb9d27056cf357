"""One pass over shards, with Ray Data or in this process: the results in the order of the shards.

    for result in map_shards(task, shards, shared, with_ray=True):
        ...

A task reads one shard and gives what is to be known of it: a count, statistics, a receipt. The
results come in the order of the shards whatever order the tasks end in, so a reduction over them
has the same bits with and without Ray. Shards go to Ray in windows: neither the driver nor the
object store holds more than one window of results that wait for their turn.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from pipelines.config import UserError
from pipelines.data.kept import Damaged

if TYPE_CHECKING:
    import ray

Shard = TypeVar("Shard")
Shared = TypeVar("Shared")
Result = TypeVar("Result")

# Shards handed to Ray Data at a time.
WINDOW = 1024


def map_shards(
    task: Callable[[Shard, Shared], Result],
    shards: Sequence[Shard],
    shared: Shared,
    *,
    with_ray: bool,
    at_once: int | None = None,
) -> Iterator[Result]:
    """The result of each shard, in order, as soon as those before it are there.

    Args:
        task: a function of a module, called with a shard and `shared`.
        shards: what says to a task where its shard lies; small.
        shared: what every task needs; put into Ray's object store once.
        with_ray: Ray Data tasks of one CPU each; else a loop in this process, which needs no Ray.
        at_once: tasks at a time; by default as many as Ray has CPUs for.

    Raises:
        UserError, OSError: as the task does, without Ray's traceback.
    """
    if not with_ray:
        yield from (task(shard, shared) for shard in shards)
        return
    if not shards:
        return
    import ray  # takes a second: only where Ray is used

    quiet_ray_data()
    work = ray.put((task, shared))
    for start in range(0, len(shards), WINDOW):
        yield from _in_order(_window(shards[start : start + WINDOW], work, at_once))


def quiet_ray_data() -> None:
    """Keep Ray Data's log lines and progress bars off the terminal."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


def dataset_of(blocks: Sequence[pa.Table]) -> ray.data.Dataset:
    """A Ray Data dataset of these blocks, neither cut nor merged.

    `ray.data.from_arrow` runs one task a block, each in a worker process that has to start first,
    only to ask for the schema; the driver holds the blocks and knows it.
    """
    import ray.data

    dataset: ray.data.Dataset = ray.data.from_blocks(list(blocks))
    return dataset


def _window(
    shards: Sequence[Any], work: ray.ObjectRef[Any], at_once: int | None
) -> Iterator[tuple[int, Any]]:
    """The number of each shard and its result, as tasks end; one block a shard."""
    import ray.data

    blocks = [_row(number, shard) for number, shard in enumerate(shards)]
    function: Any = _run  # takes a keyword more than map_batches' type knows
    dataset = dataset_of(blocks).map_batches(
        function,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"work": work},
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=at_once),
    )
    for row in dataset.iter_rows():
        result = pickle.loads(row["content"])
        if isinstance(result, UserError | OSError):
            raise result
        yield row["number"], result


def _run(batch: pa.Table, work: Any) -> pa.Table:
    """What a Ray Data task does with its block."""
    import ray

    task, shared = ray.get(work) if isinstance(work, ray.ObjectRef) else work
    rows = [(row["number"], pickle.loads(row["content"])) for row in batch.to_pylist()]
    return pa.concat_tables(_row(number, _result(task, shard, shared)) for number, shard in rows)


def _result(task: Callable[[Any, Any], Any], shard: Any, shared: Any) -> Any:
    """The result of a shard, or what it could not do: Ray would wrap that beyond finding."""
    try:
        return task(shard, shared)
    except Damaged as damaged:  # the driver is to know what
        return damaged
    except UserError as error:
        return UserError(str(error))
    except OSError as error:
        return OSError(error.errno, error.strerror or str(error), error.filename)


def _row(number: int, content: Any) -> pa.Table:
    """One row that Ray Data can move but neither cut nor merge."""
    return pa.table(
        {"number": [number], "content": pa.array([pickle.dumps(content)], pa.large_binary())}
    )


def _in_order(results: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    """What comes, by its number."""
    waiting: dict[int, Any] = {}
    turn = 0
    for number, result in results:
        waiting[number] = result
        while turn in waiting:
            yield waiting.pop(turn)
            turn += 1
