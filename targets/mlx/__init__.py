"""The MLX target is a folder that stock mlx_lm loads on a Mac: all layers share a kept count, and an expert stack has one format.

All floats of a folder have one 16-bit type, because mlx widens activations to float32 where types meet.
"""

from __future__ import annotations

from functools import partial

from edgemoe.targets import Runs, Target
from edgemoe.targets.copied_files import COPIED
from edgemoe.targets.gguf.writer import list_units
from edgemoe.targets.mlx.config import FLOATS
from edgemoe.targets.mlx.formats import FORMATS, round_rows
from edgemoe.targets.mlx.memory import memory_parts, nothing_more, offered_formats, on_device, unit_size
from edgemoe.targets.mlx.rounding import descend_rows, feeds_back, pack_rows, unpack_rows
from edgemoe.targets.mlx.run import run, runtime
from edgemoe.targets.mlx.words import WORDS
from edgemoe.targets.mlx.writer import fixed_sizes, least_shard, write
from edgemoe.targets.tokenizer.beside import check_tokenizer

__all__ = ["TARGET"]


def make_target(dtype: str, name: str) -> Target:
    """The target whose floats are "f16" or "bf16"."""
    return Target(
        name=name,
        form="stacks",
        offered=tuple(FORMATS),
        runs=Runs(compared={}, beside={"half": FLOATS[dtype]}),
        words=WORDS,
        least_shard=least_shard,
        fixed_names=("config.json", "model.safetensors", "model.safetensors.index.json", *COPIED),
        list_units=list_units,
        offered_formats=offered_formats,
        unit_size=unit_size,
        unit_extra=nothing_more,
        unit_staging=nothing_more,
        fixed_sizes=fixed_sizes,
        memory_parts=memory_parts,
        on_device=on_device,
        round_rows=partial(round_rows, dtype=dtype),
        input_block=lambda name, role: 0,
        feeds_back=feeds_back,
        pack_rows=partial(pack_rows, dtype=dtype),
        descend_rows=partial(descend_rows, dtype=dtype),
        unpack_rows=partial(unpack_rows, dtype=dtype),
        write=partial(write, dtype=dtype),
        run=run,
        check_tokenizer=check_tokenizer,
        runtime=runtime,
    )


TARGET = make_target("f16", "mlx")
