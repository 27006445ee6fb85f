"""Oracles hold what the product predicts against llama.cpp itself: its own words about its buffers, and the peak of one whole process.

With `no_alloc` llama.cpp reads metadata and tensor infos, builds its graphs and says what it would reserve; no weight is read, so a file
that ends in a hole (`write_sparse_header`) serves as well, and every architecture that llama.cpp knows is known here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgemoe.base.errors import VerifyError
from edgemoe.ir import Model
from edgemoe.ir.memory import RETAINED, Settings, peak
from edgemoe.targets.child_process import run_job
from edgemoe.targets.gguf.formats import INSTALL
from edgemoe.targets.gguf.kv_cache import KV_FORMATS
from edgemoe.targets.gguf.memory import is_repacked, memory_parts, staged_bytes
from edgemoe.targets.gguf.run import CHILD
from edgemoe.targets.gguf.writer import _add_infos, _open_writer

SAID = {  # llama.cpp's log lines of 0c1e570; sizes in MiB with two decimals
    "kv": re.compile(r"llama_kv_cache: size = +([\d.]+) MiB"),
    "state": re.compile(r"llama_memory_recurrent: size = +([\d.]+) MiB"),
    "output": re.compile(r"output buffer size = +([\d.]+) MiB"),
    "compute": re.compile(r"compute buffer size = +([\d.]+) MiB"),
}


def child_settings(settings: Settings) -> dict[str, Any]:
    """Settings as the child process takes them."""
    return {
        "context": settings.context,
        "type_k": KV_FORMATS[settings.kv_k].id,
        "type_v": KV_FORMATS[settings.kv_v].id,
        "flash": int(settings.flash),
        "ubatch": settings.ubatch,
        "sequences": settings.sequences,
        "swa_full": settings.swa_full,
        "mmap": settings.mmap,
    }


def hear_llama_cpp(path: Path, asked: Sequence[Mapping[str, Any]], *, alloc: bool = False, repack: bool = False) -> list[list[str]]:
    """llama.cpp's own lines about its buffers, for each of the settings of `child_settings`; nothing is reserved without `alloc`."""
    job = {"child": str(CHILD), "asked": asked, "alloc": alloc, "repack": repack}
    script, environment = Path(__file__).with_name("oracles_child.py"), {"GGML_NO_BACKTRACE": "1"}
    said: list[list[str]] = run_job(script, path, job, None, runtime="llama.cpp", hint=INSTALL, environment=environment)["said"]
    return said


def ask_llama_cpp(path: Path, settings: Sequence[Settings], *, outputs: int = 0) -> list[dict[str, int]]:
    """Bytes of kv, state, output and compute for each of the settings, as llama.cpp says them: to 0.01 MiB, half of which is the error.

    Args:
        path: a GGUF, of which only the header is read.
        settings: of the runs; mmap and repack do not matter here.
        outputs: rows of logits that the compute buffer is reserved for; 0: every token's, which is llama.cpp's default.

    Raises:
        VerifyError: it does not load, or llama.cpp refuses the settings.
        MachineError: llama-cpp-python is missing.
    """
    asked = [{**child_settings(each), "mmap": False, "outputs": outputs} for each in settings]
    said = hear_llama_cpp(path, asked)
    return [parse(path, lines) for lines in said]


def ask_nodes(path: Path) -> int:
    """The number of nodes that a graph may have, as llama.cpp says it, for a GGUF of which only the header is read."""
    (lines,) = hear_llama_cpp(path, [{**child_settings(Settings(context=512)), "outputs": 0}])
    return int(next(line.split("max_nodes =")[1] for line in lines if "max_nodes" in line))


def parse(path: Path, lines: Sequence[str]) -> dict[str, int]:
    text = "\n".join(lines)
    if not SAID["compute"].search(text):
        raise VerifyError(f"{path.name}: llama.cpp did not say what it would reserve", hint="this version of llama.cpp logs in other words")
    return {name: round(sum(float(size) for size in pattern.findall(text)) * 2**20) for name, pattern in SAID.items()}


def write_sparse_header(writer: Any, sizes: Sequence[int], path: Path) -> Path:
    """Finish a GGUF of metadata and tensor infos with a hole where the weights would be.

    Args:
        writer: gguf-py's, with all metadata and tensor infos added.
        sizes: bytes of the tensors, in order.
        path: the file that the writer writes.
    """
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + sum(-(-size // 32) * 32 for size in sizes))
    return path


def write_hollow(model: Model, count: int, path: Path) -> Path:
    """A GGUF with the metadata and tensor infos of a plan that keeps `count` experts, and a hole for weights: enough to ask llama.cpp."""
    writer = _open_writer(path, replace(model, n_experts=count), None, None, 0)
    infos = _add_infos(writer, model, lambda unit: "F16", count)
    return write_sparse_header(writer, list(infos.values()), path)


def predict_peak(model: Model, settings: Settings, file_size: int, units: Sequence[tuple[str, str, int]]) -> int:
    """The most that a process holds which loads a file and decodes a full context.

    From a mapped file, what was repacked is held twice, and needs no staging; when all is loaded, the ends of the file that hold nothing
    but repacked tensors are unmapped.

    Args:
        model: of the model.
        settings: of the run.
        file_size: of the GGUF in bytes.
        units: (role, format, bytes) of its tensors, in file order.
    """
    tied = all(role != "output" for role, _, _ in units)
    repacked = [settings.repack and is_repacked(name, role, tied=tied) for role, name, _ in units]
    second = sum(size for (role, _, size), copied in zip(units, repacked, strict=True) if copied and role == "token_embd")
    parts = memory_parts(model, settings.context, settings)
    if not settings.mmap:
        staging = [staged_bytes(copied, size, role) for (role, _, size), copied in zip(units, repacked, strict=True)]
        retained = max((size for size in staging if size <= RETAINED), default=0)
        if parts["kv"] <= retained:  # then the cache is made where the last copies were
            retained -= parts["kv"]
        return peak({**parts, "weights": file_size + second, "staging": max(staging, default=0), "retained": retained})
    copies = sum(size for (_, _, size), copied in zip(units, repacked, strict=True) if copied)
    stays = [number for number, copied in enumerate(repacked) if not copied or units[number][0] == "token_embd"]
    ends = sum(size for number, (_, _, size) in enumerate(units) if not stays or not stays[0] <= number <= stays[-1])
    return max(peak({**parts, "weights": file_size - ends + copies, "staging": 0}), parts["runtime"] + file_size + copies)
