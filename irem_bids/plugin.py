# SPDX-License-Identifier: Apache-2.0
"""nipype's MultiProc, mended: a killed worker is a failed step, and GPUs are kept busy.

The operating system kills a worker when memory ends.  nipype then waits forever for
its result.  Here the steps that were in the workers fail with a message, and the
groups that are left go on in new workers.

Steps on a GPU go first, and other steps leave one processor for each GPU, so that no GPU
is idle while work for it waits; the processors read and register the next groups meanwhile.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from nipype.pipeline.plugins.multiproc import MultiProcPlugin, process_initializer, run_node

KILLED = (
    "the worker process of this step, or one beside it, was killed; often memory ended: give "
    "more memory, or lower --nprocs or --mem so that fewer steps run side by side"
)


class SturdyMultiProc(MultiProcPlugin):
    """``MultiProc`` that survives the death of its workers."""

    pool: ProcessPoolExecutor

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

    def _finished(self, taskid: int, done: Future) -> None:
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
        """Jobs that may be started now, those on a GPU first."""
        ready = [int(job) for job in super()._sort_jobs(jobids, scheduler)]
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
            initializer=process_initializer,
            initargs=(os.getcwd(),),
            mp_context=multiprocessing.get_context(self.plugin_args.get("mp_context")),
        )
