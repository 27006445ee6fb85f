"""The child process of oracles.py asks llama.cpp about its buffers, with the product's own child as the way to load a file.

Job: {"child": path of child.py, "asked": [settings], "alloc": bool, "repack": bool}; without "alloc" nothing is read but the header, and
nothing is reserved.
"""

from __future__ import annotations

import importlib.util
from typing import Any


def heard(llama: Any) -> list[str]:
    """The lines of llama.cpp's log about its buffers, and about the nodes that a graph may have."""
    return [*llama.buffers(), *(line.strip() for line in "".join(llama._log).splitlines() if "max_nodes" in line)]


def do(job: dict[str, Any]) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("product_child", job["child"])
    assert spec is not None and spec.loader is not None
    child = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(child)
    plain = child.lc.llama_model_default_params

    def hollow() -> Any:
        params = plain()
        params.no_alloc = not job["alloc"]
        return params

    child.lc.llama_model_default_params = hollow
    first, *others = job["asked"]
    llama = child.Llama(job["path"], first["context"], first, repack=job["repack"])
    said = [heard(llama)]
    for settings in others:
        child.lc.llama_free(llama.context)
        llama._log.clear()
        llama.open(settings["context"], settings)
        said.append(heard(llama))
    return {"said": said}
