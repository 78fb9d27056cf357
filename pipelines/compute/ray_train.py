"""One Ray Train run over workers, and how their reports reach the driver."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from pipelines.compute.cluster import ComputeConfig
from pipelines.data.storage import Storage

if TYPE_CHECKING:  # Ray takes seconds to import: only where workers are started
    from ray.util.queue import Queue

SentT = TypeVar("SentT")
# Figures of an epoch by name.
Report: TypeAlias = dict[str, float]


def run_on_workers(
    worker: Callable[[SentT], None],
    sent: SentT,
    storage: Storage,
    compute: ComputeConfig,
) -> None:
    """One Ray Train run: `worker(sent)` on each of `compute.train_workers` workers."""
    import ray.train.torch

    # Read by Ray Train's controller, which inherits it: the default polls every two seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    name = f"train-{uuid.uuid4().hex[:8]}"
    trainer = ray.train.torch.TorchTrainer(
        # Not as `train_loop_config`: that takes a dictionary only.
        lambda: worker(sent),
        scaling_config=ray.train.ScalingConfig(
            num_workers=compute.train_workers,
            use_gpu=compute.train_gpus > 0,
            resources_per_worker={"CPU": 1, "GPU": compute.train_gpus}
            if compute.train_gpus
            else {"CPU": 1},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage.path("cache", "ray_train"),
            failure_config=ray.train.FailureConfig(max_failures=compute.max_failures),
        ),
    )
    try:
        _in_a_thread(trainer.fit)
    finally:
        if storage.is_local:
            # What Ray Train keeps of the run; the state of each training lies with its head.
            shutil.rmtree(storage.local("cache", "ray_train", name), ignore_errors=True)


def _in_a_thread(work: Callable[[], object]) -> None:
    """Run `work` and wait: on the main thread, Ray Train would answer Ctrl-C in our place.

    A wait that is interrupted leaves the thread behind, and Ray's end ends its work.
    """
    done: Future[object] = Future()

    def call() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=call, name="ray-train", daemon=True).start()
    done.result()


def sender(reports: Queue | None, number: int) -> Callable[[Report], None] | None:
    """What puts the reports of job `number` into the driver's queue, where there is one."""
    if reports is None:
        return None
    actor: Any = reports.actor

    def send(report: Report) -> None:
        # Not waited for: training never stands still for a progress line.
        actor.put.remote((number, report))

    return send


def wait_for_all(world: int) -> None:
    """No worker asks what is trained before the first has written it."""
    if world > 1:
        import torch.distributed  # the only thing here that needs torch

        torch.distributed.barrier()


@contextmanager
def forwarding(on_report: Callable[[int, Report], None] | None) -> Iterator[Queue | None]:
    """A queue whose (job number, report) a thread of the driver hands on until the block ends."""
    if on_report is None:
        yield None
        return
    import ray
    from ray.util.queue import Queue

    # An entry of None is the last. Nothing is polled: workers have the processor.
    reports: Queue = Queue(actor_options={"num_cpus": 0})

    def drain() -> None:
        while (entry := reports.get()) is not None:
            on_report(*entry)

    thread = threading.Thread(target=drain, name="finetune-reports", daemon=True)
    thread.start()
    try:
        yield reports
    finally:
        with contextlib.suppress(ray.exceptions.RayError):  # Ray ended: the thread has, too
            reports.put(None)
        thread.join()
        reports.shutdown()
