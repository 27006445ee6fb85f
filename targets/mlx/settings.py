"""This module holds the settings of an MLX target: the float type of the folder, and how mlx_lm is to keep the KV cache.

A plan remembers them as words after the target's name: "mlx-bf16", "mlx-f16-kv8", "mlx-max4096".  The command line has an option for each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.ir import Model, Stats
from edgemoe.targets.mlx.formats import LARGEST

KV_BITS = (2, 4, 8)  # mlx_lm's cache allocates a wrong number of words for others
KV_GROUP = 64  # columns of a head that share a scale and an offset (mlx_lm's --kv-group-size)
SHARE = 1 / 8  # of float16's largest number that activations may reach on calibration text
KEEP = 4  # first tokens that mlx_lm's rotating cache never forgets
CHUNK = 2048  # tokens of a prompt that mlx_lm computes together (prefill_step_size)
SMALL_CHUNK = 256  # with a setting of the cache: the scores of a larger chunk would take more than the cache saves
_WORD = re.compile(r"(?P<dtype>f16|bf16)|kv(?P<kv>\d{1,9})|max(?P<max>\d{1,9})")


@dataclass(frozen=True, slots=True)
class Settings:
    """The float type ("" until calibration has seen the activations), bits of a quantized KV cache (0: not quantized), its most tokens."""

    dtype: str = ""
    kv_bits: int = 0
    max_kv: int = 0

    @property
    def name(self) -> str:
        """The target's name with these settings."""
        kv, most = (f"kv{self.kv_bits}" if self.kv_bits else ""), (f"max{self.max_kv}" if self.max_kv else "")
        return "-".join(["mlx", *(word for word in (self.dtype, kv, most) if word)])

    @property
    def chunk(self) -> int:
        """Tokens of a prompt that are computed together."""
        return SMALL_CHUNK if self.kv_bits or self.max_kv else CHUNK

    @property
    def job(self) -> dict[str, int]:
        """How the child is to keep its cache (see child.py)."""
        told = {"kv_bits": self.kv_bits, "kv_group": KV_GROUP, "max_kv": self.max_kv, "chunk": self.chunk}
        return told if self.kv_bits or self.max_kv else {}


def parse_settings(words: str) -> Settings:
    """Settings from the words after "mlx-".

    Raises:
        UsageError: an unknown word, or settings that mlx_lm cannot combine.
    """
    found: dict[str, str] = {}
    for word in words.split("-"):
        match = _WORD.fullmatch(word)
        if match is None or match.lastgroup in found:
            raise UsageError(f"target 'mlx-{words}' is not known", hint="settings of mlx: f16 or bf16; kv8, or max4096")
        found[str(match.lastgroup)] = match[str(match.lastgroup)]
    settings = Settings(found.get("dtype", ""), int(found.get("kv", 0)), int(found.get("max", 0)))
    if "kv" in found and settings.kv_bits not in KV_BITS:
        raise UsageError(f"--kv-bits {settings.kv_bits} is not known", hint=f"known: {', '.join(map(str, KV_BITS))}")
    if "max" in found and settings.max_kv <= KEEP:
        what = f"--max-kv-size {settings.max_kv}: mlx_lm always keeps the first {KEEP} tokens"
        raise UsageError(what, hint="give more tokens than these")
    if settings.kv_bits and settings.max_kv:
        raise UsageError("--kv-bits and --max-kv-size: mlx_lm cannot quantize a cache that rotates", hint="leave one out")
    return settings


def choose_dtype(model: Model, stats: Stats) -> str:
    """float16 where the activations of the calibration text stay far below its largest number, else bfloat16."""
    return "f16" if largest_activation(model, stats) <= SHARE * LARGEST["f16"] else "bf16"


def check_dtype(model: Model, stats: Stats, dtype: str) -> None:
    """Refuse float16 where calibration saw activations that are too large for it.

    Raises:
        UsageError: names the largest activation.
    """
    largest = largest_activation(model, stats)
    if dtype == "f16" and not largest <= SHARE * LARGEST["f16"]:
        what = f"--dtype f16: the largest activation on the calibration text is {largest:.0f}, and float16 ends at 65504"
        raise UsageError(what, hint="give --dtype bf16, or leave --dtype out")


def largest_activation(model: Model, stats: Stats) -> float:
    """The largest magnitude of an activation on the calibration text; infinity if the statistics do not say."""
    found = [stats.arrays(layer).get("largest") for layer in range(model.n_layers)]
    return max(float("inf") if one is None else float(one[0]) for one in found)


def check_heads(model: Model, settings: Settings) -> None:
    """Refuse a quantized cache whose groups do not divide the heads.

    Raises:
        ModelError: names the length of a head.
    """
    lengths = (model.attention.key_length, model.attention.value_length)
    if settings.kv_bits and any(length % KV_GROUP for length in lengths):
        raise ModelError(f"{model.name}: heads of {lengths[0]} are no multiples of {KV_GROUP}", hint="leave --kv-bits out")
