"""This machine: what containers, cards and the memory that is free leave to a process."""

import stat
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from edgemoe.base.errors import MachineError, UsageError
from edgemoe.devices.detect import MARGIN, apple_pool, cgroup_limit, cpu_features, detect_device, measure_bandwidth, nvidia_pools
from edgemoe.devices.profiles import MemoryPool, budget_of, find_device

GIB = 2**30


def test_measured_bandwidth_is_that_of_memory_and_soon_known() -> None:
    began = time.monotonic()
    assert 5e8 < measure_bandwidth() < 2e12
    assert time.monotonic() - began < 20


def fake(root: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


def test_the_limit_of_a_container_counts_with_what_it_holds_less_droppable_cache(tmp_path: Path) -> None:
    root = fake(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            f"{V2}/memory.max": f"{6 * GIB}\n",
            f"{V2}/memory.current": f"{3 * GIB}\n",
            f"{V2}/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7\n",
        },
    )
    assert cgroup_limit(root) == (6 * GIB, 4 * GIB)


def test_the_tightest_limit_above_the_process_counts(tmp_path: Path) -> None:
    texts = {"proc/self/cgroup": "0::/a/b/c\n", f"{V2}/a/b/c/memory.max": "max\n", f"{V2}/a/b/memory.max": f"{9 * GIB}\n"}
    texts |= {f"{V2}/a/b/memory.current": "0\n", f"{V2}/a/memory.max": f"{4 * GIB}\n", f"{V2}/a/memory.current": f"{GIB}\n"}
    assert cgroup_limit(fake(tmp_path, texts)) == (4 * GIB, 3 * GIB)


def test_version_1_groups_are_read_and_their_no_limit_is_none(tmp_path: Path) -> None:
    texts = {"proc/self/cgroup": "12:cpu,cpuacct:/x\n5:memory:/docker/abc\n1:name=systemd:/x\n0::/x\n"}
    texts |= {f"{V1}/memory.limit_in_bytes": "9223372036854771712\n", f"{V1}/memory.usage_in_bytes": f"{GIB}\n"}
    root = fake(tmp_path, texts)
    no_limit = cgroup_limit(root)
    assert no_limit[0] == no_limit[1] >= 2**50
    fake(tmp_path, {f"{V1}/docker/abc/memory.limit_in_bytes": f"{2 * GIB}\n", f"{V1}/docker/abc/memory.usage_in_bytes": f"{GIB}\n"})
    fake(tmp_path, {f"{V1}/docker/abc/memory.stat": f"total_inactive_file {GIB // 2}\n"})
    assert cgroup_limit(root) == (2 * GIB, 3 * GIB // 2)


@pytest.mark.parametrize("text", ["", "\n", "nonsense", "0::", "0::/../../other\n", ":::::\n", "5:memory\n"])
def test_odd_group_files_are_no_limit(text: str, tmp_path: Path) -> None:
    assert cgroup_limit(fake(tmp_path, {"proc/self/cgroup": text, "other/memory.max": "5"}))[0] >= 2**50


def test_a_machine_in_a_container_gives_what_the_container_leaves_less_the_margin(tmp_path: Path) -> None:
    limit = min(2 * GIB, psutil.virtual_memory().available // 2)
    texts = {"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": str(limit), f"{V2}/memory.current": "1048576"}
    texts["proc/cpuinfo"] = "processor : 0\nflags\t\t: fpu avx2 f16c avx512f_not\n"
    device = detect_device(fake(tmp_path, texts), nvidia_smi=str(tmp_path / "none"))
    (pool,) = device.pools
    assert (pool.total, pool.usable, pool.reserve) == (limit, limit - 2**20, MARGIN) and "container" in pool.why
    assert pool.budget == limit - 2**20 - MARGIN and device.backend == "CPU" and device.cpu.endswith("avx2, f16c")


def test_a_machine_without_a_limit_gives_what_is_free_less_the_margin(tmp_path: Path) -> None:
    free = psutil.virtual_memory().available
    device = detect_device(tmp_path, nvidia_smi=str(tmp_path / "none"))
    assert device.pools[0].budget == pytest.approx(free - MARGIN, abs=GIB) and "container" not in device.pools[0].why


def test_a_machine_with_less_than_the_margin_free_gives_no_budget() -> None:
    pool = MemoryPool(name="ram", total=2 * GIB, usable=GIB, reserve=MARGIN, why="so")
    with pytest.raises(UsageError, match="not more than the reserve") as caught:
        budget_of(replace(find_device("rpi5-16gb"), pools=(pool,)))
    assert "--memory" in caught.value.hint


def test_arm_instructions_are_read_from_their_own_line(tmp_path: Path) -> None:
    root = fake(tmp_path, {"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU part\t: 0xd0b\n"})
    assert cpu_features(root) == ["asimddp", "i8mm"]


def test_nvidia_cards_are_pools_and_boxes_that_share_memory_are_not(tmp_path: Path) -> None:
    smi = program(tmp_path / "smi", "echo '24564, 24077'; echo '[N/A], [N/A]'; echo '32607, 32000'")
    assert [(p.name, p.total, p.usable, p.reserve) for p in nvidia_pools(smi)] == [
        ("vram0", 24564 * 2**20, 24077 * 2**20, MARGIN),
        ("vram1", 32607 * 2**20, 32000 * 2**20, MARGIN),
    ]
    assert detect_device(tmp_path, nvidia_smi=smi).backend.startswith("CUDA")


def test_a_driver_that_fails_is_no_card_and_one_that_hangs_is_said(tmp_path: Path) -> None:
    assert nvidia_pools(program(tmp_path / "fails", "echo '24564, 24077'; exit 9")) == ()
    assert nvidia_pools(program(tmp_path / "noise", "printf '\\377\\376 1, 2\\n99999999999999999999, 1\\n'")) == ()
    with pytest.raises(MachineError, match="did not answer"):
        nvidia_pools(program(tmp_path / "hangs", "exec sleep 30"), timeout=0.3)


@pytest.mark.parametrize(
    ("total", "wired", "free", "usable"),
    [(32, 0, 31, 21845), (16, 0, 15, 10922), (96, 0, 95, 73728), (128, 114688, 127, 114688), (128, 0, 50, 50 * 1024)],
)
def test_a_mac_gives_its_working_set_or_what_is_free(total: int, wired: int, free: int, usable: int) -> None:
    pool = apple_pool(MemoryPool(name="ram", total=total * GIB, usable=free * GIB, reserve=MARGIN, why=""), wired)
    assert pool.usable // 2**20 == usable and pool.name == "unified"
