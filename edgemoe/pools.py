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


@contextmanager
def open_pool() -> Iterator[ThreadPoolExecutor]:
    """A pool of threads, inside of which BLAS has one thread."""
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        yield pool
