"""This module describes this machine as a Device: memory within its container's limit, GPUs, instructions, measured bandwidth.

It asks the system in several ways how much memory is left now, and takes the smallest answer.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from edgemoe.base.errors import MachineError
from edgemoe.base.threads import count_cores
from edgemoe.devices.profiles import HERE, MAX_SIZE, Device, MemoryPool

MARGIN = 2**30  # bytes that llama.cpp's --fit keeps free on every device (tools/fit-params/README.md: "margin of 1024 MiB")
MARGIN_WHY = "1 GiB kept free, the margin of llama.cpp's --fit"


def detect_device(root: Path = Path("/"), nvidia_smi: str = "nvidia-smi") -> Device:
    """This machine with the memory that is free now, within the limit of its container, and on Macs within Metal's working set.

    Args:
        root: the folder that holds proc and sys/fs/cgroup.
        nvidia_smi: the program to ask for NVIDIA GPUs; if it is missing, there are none.
    """
    import psutil

    memory = psutil.virtual_memory()
    limit, room = cgroup_limit(root)
    why = f"free now (other programs hold the rest); {MARGIN_WHY}"
    if room < memory.available:
        why = f"what the memory limit of this container leaves; {MARGIN_WHY}"
    pool = MemoryPool(name="ram", total=min(memory.total, limit), usable=min(memory.available, room), reserve=MARGIN, why=why)
    if sys.platform == "darwin":
        pool = apple_pool(pool, int(_ask(["sysctl", "-n", "iogpu.wired_limit_mb"]) or 0))
    gpus = nvidia_pools(nvidia_smi)
    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    return Device(
        id=HERE,
        name=platform.node() or "this machine",
        cpu=", ".join([platform.machine(), f"{cores} cores", *cpu_features(root)]),
        backend="Metal" if sys.platform == "darwin" else "CUDA, experts in RAM" if gpus else "CPU",
        pools=(pool, *gpus),
        verified=True,
        source="detected",
        date="now",
    )


def cgroup_limit(root: Path) -> tuple[int, int]:
    """Least memory limit of this process's control group (v2 or v1) and those above it, and the memory left; 1 PiB if there is no limit.

    Cache that can be dropped at once (inactive_file) counts as left, as in `docker stats`.
    """
    limit = room = MAX_SIZE
    for folder, names in _cgroup_folders(root):
        most = _number(folder / names[0])
        if most is None or most >= MAX_SIZE:  # "max", or v1's 2^63 less a page
            continue
        cache = re.search(rf"^{names[2]} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
        held = (_number(folder / names[1]) or 0) - int(cache[1] if cache else 0)
        limit, room = min(limit, most), min(room, max(most - max(held, 0), 0))
    return limit, room


def _cgroup_folders(root: Path) -> list[tuple[Path, tuple[str, str, str]]]:
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        v1, v2 = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), ("max", "current", "inactive_file")
        limit, held, cache = v1 if controllers else v2
        parts = [p for p in path.split("/") if p not in ("", "..")]
        found += [(base.joinpath(*parts[:n]), (f"memory.{limit}", f"memory.{held}", cache)) for n in range(len(parts) + 1)]
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None


# Instructions for which ggml's CPU kernels ask (ggml/src/ggml-cpu/arch), by their names in /proc/cpuinfo.
CPU_FEATURES = ("avx2", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve", "sve2")


def cpu_features(root: Path) -> list[str]:
    """Instructions of this CPU that llama.cpp's kernels can use."""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return [name for name in CPU_FEATURES if flags and name in flags[1].split()]


def nvidia_pools(program: str, timeout: float = 10) -> tuple[MemoryPool, ...]:
    """Memory of NVIDIA GPUs, in the order of nvidia-smi; none for boxes that share it with the CPU, which answer "[N/A]"."""
    pools: list[MemoryPool] = []
    for line in _ask([program, "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"], timeout).splitlines():
        sizes = re.fullmatch(r"(\d{1,9}), *(\d{1,9})", line.strip(), re.ASCII)
        if sizes:
            total, free = (int(size) * 2**20 for size in sizes.groups())
            pools.append(MemoryPool(name=f"vram{len(pools)}", total=total, usable=free, reserve=MARGIN, why=f"free now; {MARGIN_WHY}"))
    return tuple(pools)


def apple_pool(pool: MemoryPool, wired_limit_mb: int) -> MemoryPool:
    """A Mac's memory, limited to the memory that Metal lets a process wire down.

    If `iogpu.wired_limit_mb` is not set, macOS gives two thirds up to 36 GB and three quarters or more above (seen: 21,845 of 32,768
    MiB, llama.cpp #2011; 73,728 of 98,304 MiB, llama.cpp #3213; 84 % of 128 GiB, ds4 #893).
    """
    default = pool.total * 2 // 3 if pool.total <= 36 * 2**30 else pool.total * 3 // 4
    limit = wired_limit_mb * 2**20 or default
    origin = "iogpu.wired_limit_mb" if wired_limit_mb else "least known share of RAM"
    why = f"Metal's working set ({origin}), or what is free now if that is less; {MARGIN_WHY}"
    return replace(pool, name="unified", usable=min(pool.usable, limit), why=why)


def _ask(command: list[str], timeout: float = 10) -> str:
    """The output of a program; empty if the program is missing or fails.

    Raises:
        MachineError: the program does not answer.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout, check=True).stdout
    except subprocess.TimeoutExpired as late:
        raise MachineError(f"{command[0]} did not answer in {timeout:g} s", hint="see why it hangs, or give --memory SIZE") from late
    except (OSError, subprocess.CalledProcessError):
        return ""


def measure_bandwidth(seconds: float = 0.25) -> float:
    """Bytes per second that this machine's cores move together, measured now: the best of repeated copies, with reads and writes counted.

    STREAM's "copy" counts in the same way (McCalpin 1995).  Each core copies 32 MiB to another 32, which is several times its share of
    the largest caches (12 MiB); many cores together take at most 2 GiB or an eighth of free memory, whichever is less.
    """
    import time
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import psutil

    workers = count_cores()
    size = min(2**25, min(2**31, psutil.virtual_memory().available // 8) // (2 * workers))
    pairs = [(np.ones(size, np.uint8), np.ones(size, np.uint8)) for _ in range(workers)]
    best, end = float("inf"), time.perf_counter() + seconds
    with ThreadPoolExecutor(workers) as pool:
        while best == float("inf") or time.perf_counter() < end:
            began = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(*pair), pairs))
            best = min(best, time.perf_counter() - began)
    return 2 * size * workers / best
