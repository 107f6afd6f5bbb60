"""Worker processes: each claims a job, runs it in a child process and renews the lease until it ends.

The child does the work with one thread and a low priority; its parent watches lease and cancellation and can always
end it, also when it hangs in C code. Progress comes over a pipe.
"""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from control_plane.config import ControlPlaneConfig
from control_plane.data.catalog import note_version
from control_plane.database.engine import open_database, writing
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.datasets import Dataset
from control_plane.database.tables.jobs import JobKind, JobState
from control_plane.jobs.queue import Claim, claim, finish, heartbeat
from control_plane.jobs.requests import TrainRequest, check_import, check_training
from control_plane.registry.store import Store
from control_plane.registry.versions import register
from models.errors import SortlineError

log = logging.getLogger("sortline.worker")
_BEAT_S: Final = 1.0
_GRACE_S: Final = 5.0
_POLL_S: Final = 0.5
_PAUSE_S: Final = 2.0
"""Pause before the next attempt while the database does not answer."""
Say = Callable[[str, float], None]


def run_worker(config: ControlPlaneConfig, stop: Callable[[], bool]) -> None:
    """Claims and runs jobs until `stop()`."""
    engine = open_database(config.database_url)
    name = f"{socket.gethostname()}-{os.getpid()}"
    log.info("worker %s waits for jobs", name)
    away = False
    while not stop():
        try:
            held = claim(
                engine, name, lease_s=config.jobs.lease_s, max_attempts=config.jobs.max_attempts, now=utc_now()
            )
            if held is not None:
                log.info("job %s %s starts", held.job_id, held.kind)
                _run(config, engine, held, stop)
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            # A job that was running is claimed again when its lease has ended.
            if not away:
                log.warning("the database is away: %s", str(error.__cause__ or error).splitlines()[0])
            away = True
            time.sleep(_PAUSE_S)
            continue
        if away:
            log.info("the database is back")
            away = False
        if held is None:
            time.sleep(_POLL_S)
    engine.dispose()


def _run(config: ControlPlaneConfig, engine: Engine, held: Claim, stop: Callable[[], bool]) -> None:
    """Runs one job in a child process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    scratch = config.root / "jobs" / f"{held.job_id}-{held.fence}"
    child = context.Process(target=_child, args=(config, held, scratch, theirs), name=f"job-{held.job_id}")
    child.start()
    theirs.close()
    try:
        outcome = _watch(config, engine, held, stop, child, ours)
    except BaseException:
        _end(child, wait_s=0.0)
        raise
    _conclude(config, engine, held, scratch, outcome)
    shutil.rmtree(scratch, ignore_errors=True)


def _watch(
    config: ControlPlaneConfig, engine: Engine, held: Claim, stop: Callable[[], bool], child: Any, ours: Connection
) -> dict[str, Any]:
    """Renews the lease until the child has ended or must end; returns its outcome, empty when it was stopped."""
    outcome: dict[str, Any] = {}
    stage, share, lines = "starting", 0.0, [f"{utc_now():%H:%M:%S} {held.kind} starts"]
    going_on = True
    while going_on:
        until = time.monotonic() + _BEAT_S
        ended = False
        while not ended and (left := until - time.monotonic()) > 0.0:
            message = _receive(ours, left)
            if message is None:
                continue
            ended = message[0] in {"done", "failed", "gone"}
            if message[0] == "progress":
                if message[1] != stage:
                    lines.append(f"{utc_now():%H:%M:%S} {message[1]}")
                stage, share = message[1], message[2]
            else:
                outcome = {"how": message[0], "what": message[1] if len(message) > 1 else {}}
        going_on = heartbeat(engine, held, stage=stage, progress=share, lines=lines, lease_s=config.jobs.lease_s)
        lines = []
        if ended:
            break
        going_on = going_on and not stop()
    _end(child, wait_s=_GRACE_S if outcome else 0.0)
    return outcome


def _receive(pipe: Connection, timeout_s: float) -> tuple[Any, ...] | None:
    try:
        return tuple(pipe.recv()) if pipe.poll(timeout_s) else None
    except (EOFError, OSError):
        return ("gone",)


def _end(child: Any, wait_s: float) -> None:
    """Waits for a child that is done; stops any other one by SIGTERM, then by SIGKILL."""
    child.join(wait_s)
    if child.is_alive():
        os.killpg(child.pid, signal.SIGTERM) if os.getpgid(child.pid) == child.pid else child.terminate()
        child.join(_GRACE_S)
    if child.is_alive():
        child.kill()
        child.join()


def _conclude(config: ControlPlaneConfig, engine: Engine, held: Claim, scratch: Path, outcome: dict[str, Any]) -> None:
    how = outcome.get("how")
    if how == "done":
        try:
            result = _register(config, engine, held, scratch, outcome["what"])
        except SortlineError as refusal:
            finish(engine, held, JobState.FAILED, error=refusal.as_dict())
            return
        finish(engine, held, JobState.SUCCEEDED, result=result)
    elif how == "failed":
        finish(engine, held, JobState.FAILED, error=outcome["what"])
    elif how == "gone":
        error = {"code": "job.process_died", "message": "The job's process died; its log says how far it came."}
        finish(engine, held, JobState.FAILED, error=error)
    else:
        finish(engine, held, JobState.CANCELLED)
    log.info("job %s ended: %s", held.job_id, how or "cancelled")


def _register(
    config: ControlPlaneConfig, engine: Engine, held: Claim, scratch: Path, result: dict[str, Any]
) -> dict[str, Any]:
    """Adds the child's bundle to store and registry, in one transaction with the dataset version."""
    with writing(engine) as session:
        actor = str(held.params.get("actor", "worker"))
        now = utc_now()
        version = register(
            session, Store(config.root / "store"), scratch / "bundle", actor=actor, now=now, job_id=held.job_id
        )
        dataset_id = held.params.get("dataset_id")
        dataset = session.get(Dataset, dataset_id) if dataset_id else None
        if dataset is not None and "dataset" in result:
            note_version(session, dataset, result["dataset"], now)
        session.commit()
        return result | {"bundle": version.bundle, "version": version.number, "model": held.params.get("name")}


# -- in the child ---------------------------------------------------------------------------------------------------


def _child(config: ControlPlaneConfig, held: Claim, scratch: Path, pipe: Connection) -> None:
    """Does the work of the child; results and progress go through the pipe only."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"  # more threads than cores cost HistGradientBoosting a factor of ten
    os.nice(config.jobs.niceness)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    lock = threading.Lock()

    def say(stage: str, share: float) -> None:
        with lock:
            pipe.send(("progress", stage, share))

    try:
        result = _work(held, scratch, say)
        # Only plain JSON crosses the pipe, because the API can show nothing else.
        pipe.send(("done", json.loads(json.dumps(result))))
    except SortlineError as error:
        pipe.send(("failed", error.as_dict()))
    except Exception as error:
        log.exception("job failed")
        pipe.send(("failed", {"code": "job.failed", "message": f"{type(error).__name__}: {error}"[:600]}))
    finally:
        pipe.close()


def _work(held: Claim, scratch: Path, say: Say) -> dict[str, Any]:
    params = held.params
    if held.kind is JobKind.TRAIN:
        from control_plane.training.pipeline import TrainSettings, train  # noqa: PLC0415

        asked = {name: params[name] for name in TrainRequest.__struct_fields__ if name in params}
        settings = TrainSettings(**check_training(asked))
        return train(Path(params["root"]), settings, scratch / "bundle", progress=say).summary()
    from control_plane.training.foreign.onnx_import import ImportSettings, import_onnx  # noqa: PLC0415

    settings_ = ImportSettings(**check_import(params["path"], params["settings"]))
    say("importing", 0.1)
    return import_onnx(Path(params["path"]), settings_, scratch / "bundle").summary()
