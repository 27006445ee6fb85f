"""The MLX target is a folder that stock mlx_lm loads on a Mac: all layers share a kept count, and an expert stack has one format.

All floats of a folder have one 16-bit type, because mlx widens activations to float32 where types meet.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from edgemoe.ir import Model, Stats
from edgemoe.targets import Runs, Target
from edgemoe.targets.copied_files import COPIED
from edgemoe.targets.mlx.config import FLOATS
from edgemoe.targets.mlx.formats import FORMATS, round_rows
from edgemoe.targets.mlx.memory import memory_parts, nothing_more, offered_formats, on_device, unit_size
from edgemoe.targets.mlx.reader import decode_folder
from edgemoe.targets.mlx.rounding import descend_rows, feeds_back, pack_rows, unpack_rows
from edgemoe.targets.mlx.run import run, runtime
from edgemoe.targets.mlx.settings import Settings, check_dtype, choose_dtype, parse_settings
from edgemoe.targets.mlx.words import words_of
from edgemoe.targets.mlx.writer import fixed_sizes, least_shard, write
from edgemoe.targets.stacks import list_units
from edgemoe.targets.tokenizer.beside import check_tokenizer

__all__ = ["TARGET", "with_settings"]


def _make_target(settings: Settings) -> Target:
    """The target with these settings; floats are float16 until they are settled."""
    dtype = settings.dtype or "f16"

    def settle(model: Model, stats: Stats) -> Target:
        check_dtype(model, stats, settings.dtype)
        return _make_target(replace(settings, dtype=settings.dtype or choose_dtype(model, stats)))

    return Target(
        name=settings.name,
        form="stacks",
        offered=tuple(FORMATS),
        runs=Runs(compared={}, beside={"half": FLOATS[dtype], **settings.job}),
        words=words_of(settings, FLOATS[dtype]),
        least_shard=least_shard,
        fixed_names=("config.json", "model.safetensors", "model.safetensors.index.json", *COPIED),
        list_units=list_units,
        offered_formats=offered_formats,
        unit_size=unit_size,
        unit_extra=nothing_more,
        unit_staging=nothing_more,
        fixed_sizes=fixed_sizes,
        memory_parts=partial(memory_parts, settings=settings),
        settle=settle,
        on_device=on_device,
        round_rows=partial(round_rows, dtype=dtype),
        input_block=lambda name, role: 0,
        feeds_back=feeds_back,
        pack_rows=partial(pack_rows, dtype=dtype),
        descend_rows=partial(descend_rows, dtype=dtype),
        unpack_rows=partial(unpack_rows, dtype=dtype),
        write=partial(write, dtype=dtype),
        run=partial(run, settings=settings),
        check_tokenizer=check_tokenizer,
        runtime=runtime,
        decode=decode_folder,
    )


def with_settings(words: str) -> Target:
    """The target with the settings that a plan's target names after a dash.

    Raises:
        UsageError: an unknown word, or settings that mlx_lm cannot combine.
    """
    return _make_target(parse_settings(words))


TARGET = _make_target(Settings())
