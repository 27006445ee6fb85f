"""Threads for numpy work: as many as cores, each with one-thread BLAS.

Threads times BLAS threads would spin against each other (packing a layer took five times the CPU), and sums whose order depends on the
number of BLAS threads would make bytes depend on the machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from threadpoolctl import threadpool_limits


def count_cores() -> int:
    """Cores that this process may use: those of `taskset`, a batch system or a container's cpuset, where the system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def open_threads() -> Iterator[ThreadPoolExecutor]:
    """A pool of threads, inside of which BLAS has one thread."""
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(count_cores()) as pool:
        yield pool
