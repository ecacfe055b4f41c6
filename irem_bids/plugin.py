# SPDX-License-Identifier: Apache-2.0
"""nipype's MultiProc, mended: a killed worker is a failed step, and GPUs are kept busy.

The operating system kills a worker when memory ends.  nipype then waits forever for
its result.  Here the steps that were in the workers fail with a message, and the
groups that are left go on in new workers.  No worker outlives the run, also where the
run was killed.

Steps on a GPU go first, and other steps leave one processor for each GPU, so that no GPU
is idle while work for it waits; the processors read and register the next groups meanwhile.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from typing import Any

from nipype.pipeline.plugins.multiproc import MultiProcPlugin, process_initializer, run_node

from . import stop

KILLED = (
    "the worker process of this step, or one beside it, was killed; often memory ended: give "
    "more memory, or lower --nprocs or --mem so that fewer steps run side by side"
)
WORKERS_GRACE = 5.0  # s that workers have to save and leave


def start_worker(folder: str) -> None:
    """What a worker does first: it ends with the run, and saves on SIGTERM."""
    process_initializer(folder)
    stop.install(worker=True)
    threading.Thread(target=_end_with_run, name="orphan", daemon=True).start()


def _end_with_run() -> None:
    """A run that was killed must not go on in its workers, beside the run that follows."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class SturdyMultiProc(MultiProcPlugin):
    """``MultiProc`` that survives the death of its workers."""

    pool: ProcessPoolExecutor
    turns: list[int]  # per node the place of its group among all

    def __init__(self, plugin_args: dict[str, Any] | None = None) -> None:
        super().__init__(plugin_args=plugin_args)
        self.pool = self._new_pool()  # nothing was submitted to the one of nipype
        if self.plugin_args.get("mp_context") == "forkserver":
            _start_forkserver()

    def stop(self) -> None:
        """End every worker: SIGTERM, some seconds to save, SIGKILL."""
        workers = list((self.pool._processes or {}).values())
        for worker in workers:
            with contextlib.suppress(OSError, ValueError):
                worker.terminate()
        until = time.monotonic() + WORKERS_GRACE
        while any(w.is_alive() for w in workers) and time.monotonic() < until:
            time.sleep(0.05)
        self.kill()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def kill(self) -> None:
        """End every worker at once."""
        for worker in list((self.pool._processes or {}).values()):
            with contextlib.suppress(OSError, ValueError):
                worker.kill()

    def _submit_job(self, node: Any, updatehash: bool = False) -> int:
        self._taskid += 1
        taskid = self._taskid
        try:
            future = self.pool.submit(run_node, node, updatehash, taskid)
        except BrokenProcessPool:
            self.pool = self._new_pool()
            future = self.pool.submit(run_node, node, updatehash, taskid)
        self._task_obj[taskid] = future
        future.add_done_callback(lambda done: self._finished(taskid, done))
        return taskid

    def _generate_dependency_list(self, graph: Any) -> None:
        super()._generate_dependency_list(graph)
        groups = list(dict.fromkeys(node._hierarchy for node in self.procs))
        self.turns = [groups.index(node._hierarchy) for node in self.procs]

    def _finished(self, taskid: int, done: Future) -> None:
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            self._taskresult[taskid] = done.result()
            return
        message = KILLED if isinstance(error, BrokenProcessPool) else str(error)
        self._taskresult[taskid] = {
            "result": None,
            "traceback": [f"{type(error).__name__}: {message}"],
            "taskid": taskid,
        }

    def _sort_jobs(self, jobids: Iterable[int], scheduler: str | None = "tsort") -> list[int]:
        """Jobs that may be started now, those on a GPU first, and group by group.

        nipype would take every group through a step before the next step, so that none would
        be finished for long.
        """
        ready = [int(job) for job in super()._sort_jobs(jobids, scheduler)]
        ready.sort(key=lambda job: self.turns[job])
        on_gpu = [job for job in ready if self.procs[job].is_gpu_node()]
        rest = [job for job in ready if not self.procs[job].is_gpu_node()]
        _, processors, _ = self._check_resources(self.pending_tasks)
        processors -= self._reserved()
        fitting = []
        for job in rest:
            needed = min(self.procs[job].n_procs, self.processors)
            if needed <= processors:
                processors -= needed
                fitting.append(job)
        return on_gpu + fitting

    def _reserved(self) -> int:
        """Processors to keep for steps on idle GPUs, where there are more than a step needs."""
        waiting = sum(
            self.procs[job].is_gpu_node() for job, done in enumerate(self.proc_done) if not done
        )
        running = sum(self.procs[job].is_gpu_node() for _, job in self.pending_tasks)
        others = [node.n_procs for node in self.procs if not node.is_gpu_node()]
        spare = max(0, self.processors - max(others, default=0))
        return max(0, min(self.n_gpu_procs - running, waiting, spare - running))

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            max_workers=self.processors,
            initializer=start_worker,
            initargs=(os.getcwd(),),
            mp_context=multiprocessing.get_context(self.plugin_args.get("mp_context")),
        )


def _start_forkserver() -> None:
    """Start it deaf to SIGTERM, which clusters send to all: workers would die with it."""
    if threading.current_thread() is not threading.main_thread():
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGTERM, before)
