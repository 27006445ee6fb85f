"""A GGUF's header -> the buffers that llama.cpp itself would make for it: the exact way, where llama.cpp is installed.

With `no_alloc` llama.cpp reads metadata and tensor infos, builds its graphs and says what it would reserve; no weight is read, so a file
that ends in a hole (`write_sparse_header`) serves as well, and every architecture that llama.cpp knows is known here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgemoe.base.errors import VerifyError
from edgemoe.ir.memory import Settings
from edgemoe.targets.gguf.kv_cache import KV_FORMATS
from edgemoe.targets.gguf.run import run

_SAID = {  # llama.cpp's log lines of 0c1e570; sizes in MiB with two decimals
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
    said = run(path, {"asked": asked})["said"]
    return [_parse(path, lines) for lines in said]


def _parse(path: Path, lines: Sequence[str]) -> dict[str, int]:
    text = "\n".join(lines)
    if not _SAID["compute"].search(text):
        raise VerifyError(f"{path.name}: llama.cpp did not say what it would reserve", hint="this version of llama.cpp logs in other words")
    return {name: round(sum(float(size) for size in pattern.findall(text)) * 2**20) for name, pattern in _SAID.items()}


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
