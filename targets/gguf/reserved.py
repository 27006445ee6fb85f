"""This module asks llama.cpp itself which caches and buffers a GGUF's model needs, without loading any weight.

llama.cpp knows them for every architecture that it runs: recurrent states, latent attention, sliding windows, indexers.  The compute buffer
is what llama.cpp reserves for the model with all of its experts, of which a run touches most, so the prediction is an upper limit.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path

from edgemoe.base.errors import ModelError, VerifyError
from edgemoe.ir import Model
from edgemoe.ir.memory import Settings
from edgemoe.model.gguf_model import first_file
from edgemoe.targets.gguf.formats import FORMATS
from edgemoe.targets.gguf.kv_cache import rows_of
from edgemoe.targets.gguf.run import run

MIB = 2**20
# Nodes of a graph for each token and each tensor, where scans over tokens or many streams need more than llama.cpp's usual 8 a tensor.
_SCANS = ("qwen3next", "kimi-linear", "bailingmoe3", "qwen35", "qwen35moe", "qwen4exp", "deepseek4", "minimax-01", "minimax-m3", "hy_v4")
NODES = dict.fromkeys(_SCANS, (40, 32)) | dict.fromkeys(("kimi-k3", "glm5-next"), (160, 64))
ROUNDED = 0.005  # MiB: llama.cpp prints two digits
_PLACE = re.compile(r"/\S*/(?=\S+:\d+: )")  # folders of llama.cpp's own sources, where it was compiled
_SIZES = {"kv": re.compile(r"llama_\w+: size =\s*([\d.]+) MiB"), "compute": re.compile(r"compute buffer size =\s*([\d.]+) MiB")}


@dataclass(frozen=True, slots=True)
class Reserved:
    """Bytes of caches and recurrent states, and of compute and work buffers."""

    kv: int
    compute: int


def ask_llama(model: Model, settings: Settings) -> Reserved:
    """What llama.cpp reserves for a GGUF's model.

    Raises:
        MachineError: llama-cpp-python is missing.
        ModelError: llama.cpp does not take the model.
    """
    log = _ask(first_file(model), settings)
    sizes = {part: sum(math.ceil((float(size) + ROUNDED) * MIB) for size in pattern.findall(log)) for part, pattern in _SIZES.items()}
    return Reserved(sizes["kv"], sizes["compute"] + work_bytes(model, settings))


def most_nodes(model: Model, settings: Settings) -> int:
    """Places that llama.cpp makes for a graph's nodes (graph_max_nodes in llama-context.cpp)."""
    tensors = len({(tensor.layer, tensor.role) for tensor in model.tensors})  # of the file, in which a stack of experts is one tensor
    each_token, each_tensor = NODES.get(model.architecture, (0, 8))
    return max(1024, each_token * rows_of(settings), each_tensor * tensors)


@functools.lru_cache
def _ask(path: Path, asked: Settings) -> str:
    """The log of a run that loads no weights."""
    own = {"ubatch": asked.ubatch, "sequences": asked.sequences, "swa_full": asked.swa_full}
    own |= {
        "type_k": FORMATS[asked.kv_k].id,
        "type_v": FORMATS[asked.kv_v].id,
        "outputs": rows_of(asked) if asked.every_logit else asked.sequences,
    }
    own |= {} if asked.flash else {"flash": 0}  # llama.cpp turns it on where it can
    try:
        return "".join(run(path, {"reserve": asked.context, "settings": own})["log"])
    except VerifyError as error:
        reason = _PLACE.sub("", str(error)).removeprefix(f"{path.name}: ")
        raise ModelError(f"{path}: {reason}", hint="is the file whole, and not newer than this llama.cpp?") from error


def work_bytes(model: Model, settings: Settings) -> int:
    """At most the bytes of ggml's work buffer: the right operand of the largest product in 16 bits, and the rows of each expert."""
    rows = rows_of(settings)
    chosen = model.top_k * rows
    widest = max((tensor.shape[-1] for tensor in model.tensors if tensor.planned and tensor.expert < 0), default=model.hidden_size)
    return max(2 * rows * widest, 2 * chosen * model.expert.size + 8 * chosen)
