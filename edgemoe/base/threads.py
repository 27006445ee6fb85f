"""This module opens threads for numpy work, one for each core, and each uses BLAS with one thread.

BLAS with several threads in each of our threads would compete for the cores (packing a layer took five times the CPU time).  The order of
sums would also depend on the number of BLAS threads, and so bytes would depend on the machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from threadpoolctl import threadpool_limits


def count_cores() -> int:
    """Cores that this process may use; if the system says so, those of `taskset`, a batch system or a container's cpuset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def open_threads() -> Iterator[ThreadPoolExecutor]:
    """A pool of threads, inside of which BLAS has one thread."""
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(count_cores()) as pool:
        yield pool
