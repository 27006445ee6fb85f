"""Builds that share a work folder wait for each other."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgemoe.base.files import alone


def test_builds_that_share_a_work_folder_make_each_thing_one_after_the_other(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def make(_: int) -> None:
        with alone(tmp_path / "stats-1"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            inside[0] -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(make, range(8)))
    assert most == [1]
    assert not list(tmp_path.glob("stats-*"))  # the lock is not taken for what it guards
