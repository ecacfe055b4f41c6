# SPDX-License-Identifier: Apache-2.0
"""nipype's MultiProc, mended: a worker that is killed is a failed step, not a hang.

The operating system kills a worker when memory ends.  nipype then waits forever for
its result.  Here the steps that were in the workers fail with a message, and the
groups that are left go on in new workers.
"""

from __future__ import annotations

import multiprocessing
import os
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

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            max_workers=self.processors,
            initializer=process_initializer,
            initargs=(os.getcwd(),),
            mp_context=multiprocessing.get_context(self.plugin_args.get("mp_context")),
        )
