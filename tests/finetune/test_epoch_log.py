"""Epoch reports reach MLflow while heads are trained, in few calls and never twice."""

import pytest

from pipelines.finetune import epoch_log
from pipelines.finetune.epoch_log import EpochLog

HISTORY = [{"epoch": float(e), "loss": 1.0 / e, "loss/margin": 0.5 / e} for e in range(1, 41)]


@pytest.fixture
def calls(monkeypatch):
    """The number of calls that write, by kind."""
    from mlflow import MlflowClient

    seen = []
    for name in ("log_batch", "log_metric"):
        original = getattr(MlflowClient, name)

        def counted(*args, name=name, original=original, **kwargs):
            seen.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(MlflowClient, name, counted)
    return seen


def steps(tracker, run_id, key):
    found = tracker.client.get_metric_history(run_id, key)
    return [(m.step, m.value) for m in sorted(found, key=lambda m: m.step)]


def test_forty_epochs_go_out_in_two_batches_and_the_rest_at_the_end(
    mlflow_store, calls, monkeypatch
):
    tracker, clock = mlflow_store.tracker, [0.0]
    monkeypatch.setattr(epoch_log.time, "monotonic", lambda: clock[0])
    with tracker.run("main") as main:
        pass
    opened = []

    def open_run(name):
        opened.append(name)
        return tracker.run(name, parent=main.run_id)

    log = EpochLog(open_run, every_s=10)
    calls.clear()
    for report in HISTORY[:30]:
        clock[0] += 0.7
        log.add("finetune ebm seed 0", report)
    assert opened == ["finetune ebm seed 0"] * 2
    metrics = len(calls)
    log.finish("finetune ebm seed 0", HISTORY)
    with tracker.run("finetune ebm seed 0", parent=main.run_id) as active:
        pass
    expected = [(e, pytest.approx(1.0 / e)) for e in range(1, 41)]
    assert steps(tracker, active.run_id, "loss") == expected
    assert len(steps(tracker, active.run_id, "loss/margin")) == 40
    # For each send one batch of numbers, and the tag of the process that opened the run.
    assert metrics == 4
    assert "log_metric" not in calls


def test_a_restarted_driver_sends_only_what_is_missing(mlflow_store):
    tracker = mlflow_store.tracker
    with tracker.run("restarted") as main:
        pass

    def log():
        return EpochLog(lambda name: tracker.run(name, parent=main.run_id), every_s=0)

    first, second = log(), log()
    for report in HISTORY[:5]:
        first.add("coop", report)
    for report in HISTORY[3:8]:  # two epochs were lost and come again
        second.add("coop", report)
    second.finish("coop", HISTORY[:8])
    with tracker.run("coop", parent=main.run_id) as active:
        pass
    assert [step for step, _ in steps(tracker, active.run_id, "loss")] == list(range(1, 9))
