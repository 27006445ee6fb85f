"""What people do for mlx_lm today: stock conversions, recipes, dynamic_quant, gptq, and drops by REAP before a conversion.

A peer is a loaded mlx model whose modules are quantized; its bytes are those of its arrays, and its weights are what these decode to.
Every peer starts from a folder of 16-bit floats that our writer makes, which equals the original.  Recipes whose rounding is weighed by
importance (oQe's clipping, jundot/omlx) are rounded in numpy, and counted by the same formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold
from mlx_lm.quant.gptq import gptq_quantize
from mlx_lm.utils import load_config, load_model, quantize_model

from edgemoe.base.types import F32
from edgemoe.targets.mlx.formats import FORMATS, row_bytes, to_half

GROUP = 64
RECIPES = [(a, r) for a in (2, 3, 4, 5) for r in (3, 4, 5, 6, 8) if a <= r]
DOWNS = ((2, 3, 8), (2, 4, 6), (3, 4, 8), (4, 5, 8))  # bits of gate and up, of down, of the rest
DYNAMIC = (((2, 4), (3.0, 3.5)), ((2, 6), (3.0, 3.5)), ((3, 6), (4.0, 4.5)), ((4, 8), (5.0, 5.5)))  # low and high bits, bits per weight
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # shares of the range that the clipping tries


@dataclass(frozen=True)
class Peer:
    """A peer's weights by name, in float32, and the bytes of its arrays."""

    kind: str
    name: str
    values: dict[str, F32]
    size: int


def open_base(folder: Path, *, wide: bool = False) -> Any:
    """The model of 16-bit floats, or widened to float32."""
    model, _ = load_model(folder, strict=True)
    if wide:
        model.update(tree_map(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters()))
    return model


def decode(kind: str, name: str, model: Any) -> Peer:
    """What the arrays of a quantized model decode to."""
    values, size = {}, 0
    for path, module in model.named_modules():
        own = {key: value for key, value in module.items() if isinstance(value, mx.array)}
        size += sum(value.nbytes for value in own.values())
        if "scales" in own:
            scales = own["scales"] if own["scales"].dtype == mx.uint8 else own["scales"].astype(mx.float32)
            biases = own["biases"].astype(mx.float32) if own.get("biases") is not None else None
            weight = mx.dequantize(own["weight"], scales, biases, group_size=module.group_size, bits=module.bits, mode=module.mode)
            values[f"{path}.weight"] = np.array(weight.astype(mx.float32))
        else:
            values |= {f"{path}.{key}": np.array(value.astype(mx.float32)) for key, value in own.items()}
    return Peer(kind=kind, name=name, values=values, size=size)


def converted(folder: Path, kind: str, name: str, bits: int | None, group: int | None, mode: str = "affine", predicate: Any = None) -> Peer:
    """What `mlx_lm.convert` makes."""
    model = open_base(folder)
    if isinstance(predicate, str):
        predicate = mixed_quant_predicate_builder(predicate, model, group or GROUP)
    config = {key: value for key, value in load_config(folder).items() if key not in ("quantization", "quantization_config")}
    return decode(kind, name, quantize_model(model, config, group, bits, mode=mode, quant_predicate=predicate)[0])


def by_recipe(experts: int, rest: int, down: int = 0, group: int = GROUP) -> Callable[[str, Any], Any]:
    """Experts in one width, everything else in another, the router in floats: what most hand-made folders are."""

    def predicate(path: str, module: Any) -> Any:
        if path.endswith((".gate", ".shared_expert_gate")):
            return False
        if "switch_mlp" in path:
            return {"bits": down if down and "down_proj" in path else experts, "group_size": group}
        return {"bits": rest, "group_size": GROUP}

    return predicate


def stock_peers(bf16: Path, f16: Path) -> Iterator[Peer]:
    """Conversions and recipes."""
    for bits, group in (
        (2, 64),
        (3, 64),
        (4, 64),
        (5, 64),
        (6, 64),
        (8, 64),
        (2, 32),
        (3, 32),
        (4, 32),
        (8, 32),
        (2, 128),
        (3, 128),
        (4, 128),
    ):
        yield converted(bf16, "uniform", f"{bits} bits, g{group}", bits, group)
    for bits in (3, 4, 6, 8):
        yield converted(f16, "uniform", f"{bits} bits, g64, float16", bits, GROUP)
    for mode in ("mxfp4", "nvfp4", "mxfp8"):
        yield converted(bf16, "uniform", mode, None, None, mode)
    for name in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"):
        yield converted(bf16, "mixed", name, 4, GROUP, predicate=name)
    for experts, rest in RECIPES:
        for folder, group in ((bf16, 64), (bf16, 128), (f16, 128)):
            name = f"experts {experts} g{group}, rest {rest}{', float16' if folder == f16 else ''}"
            yield converted(folder, "recipe", name, 4, GROUP, predicate=by_recipe(experts, rest, group=group))
    for experts, down, rest in DOWNS:
        yield converted(f16, "recipe", f"experts {experts}, down {down}, rest {rest}", 4, GROUP, predicate=by_recipe(experts, rest, down))


# ------------------------------------------------------------------------------------------------------------ with a calibration
def calibrated_peers(bf16: Path, f16: Path, tokens: F32, importance: Mapping[str, F32]) -> Iterator[Peer]:
    """dynamic_quant, gptq, and recipes with oQe's clipping.

    Args:
        bf16: folder of 16-bit floats.
        f16: the same in float16.
        tokens: of calibration text [windows, length].
        importance: mean squares of the inputs of a weight's columns, by its name, [cols] or [E, cols].
    """
    yield from clipped_peers(f16, importance)
    data = mx.array(tokens)
    for (low, high), targets in DYNAMIC:
        model = open_base(bf16, wide=True)
        sensitivities = dict(estimate_sensitivities(model, data, low, GROUP, high, GROUP, batch_size=2))
        for bits in targets:
            threshold = estimate_threshold(open_base(bf16), sensitivities, bits, low, GROUP, high, GROUP)

            def predicate(path: str, module: Any, cut: float = threshold, seen: Any = sensitivities, more: int = high) -> Any:
                return {"bits": more, "group_size": GROUP} if seen[path] > cut else True

            yield converted(bf16, "dynamic_quant", f"{low} to {high} bits, {bits:g} bpw", low, GROUP, predicate=predicate)
    for bits in (2, 4):
        model = gptq_quantize(open_base(bf16, wide=True), data, bits, GROUP, 6, GROUP, batch_size=2)[0]
        for module in model.modules():
            module.set_dtype(mx.bfloat16)
        yield decode("gptq", f"{bits} bits", model)


def clipped_peers(f16: Path, importance: Mapping[str, F32]) -> Iterator[Peer]:
    """Recipes with a range of each group that is clipped so that the error weighed by importance is least."""
    base = decode("", "", open_base(f16))
    for experts, rest in RECIPES:
        values, size = dict(base.values), base.size
        choose = by_recipe(experts, rest, group=128)
        for name, weight in base.values.items():
            module = name.removesuffix(".weight")
            entry: Any = choose(module, None) if weight.ndim >= 2 and not module.endswith("gate") else False
            if entry:
                kind = f"INT{entry['bits']}_{entry['group_size']}"
                values[name] = clip_round(weight, kind, importance.get(name))
                size += weight[..., 0].size * row_bytes(kind, weight.shape[-1]) - 2 * weight.size
        yield Peer(kind="oQe clipping", name=f"experts {experts} g128, rest {rest}, float16", values=values, size=size)


def clip_round(weight: F32, kind: str, importance: F32 | None) -> F32:
    """Rows [.., cols] rounded between shrunk ends of each group's range, the best of CLIPS by importance."""
    group, top = FORMATS[kind].group, 2 ** FORMATS[kind].bits - 1
    x = weight.reshape(*weight.shape[:-1], -1, group)
    cares = np.ones(weight.shape[-1], np.float32) if importance is None else importance
    cares = cares.reshape(*cares.shape[:-1], *([1] if cares.ndim == 2 else []), -1, group)
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    least, best = np.full(x.shape[:-1], np.inf, np.float32), np.empty_like(x)
    for clip in CLIPS:
        scale, offset = (to_half(part, "f16").astype(np.float32) for part in ((high - low) * clip / top, low * clip))
        q = np.clip(np.rint((x - offset) / np.where(scale == 0, 1, scale)), 0, top)
        found = q * scale + offset
        error = (cares * (found - x) ** 2).sum(axis=-1)
        better = error < least
        least[better], best[better] = error[better], found[better]
    return best.reshape(weight.shape)


def dropped_peers(base: Path, kind: str, share: str) -> Iterator[Peer]:
    """A folder whose experts were dropped by a score, and a conversion."""
    for bits in (2, 3, 4):
        yield converted(base, kind, f"keep {share}, {bits} bits", bits, GROUP)
    for experts, rest in ((2, 6), (3, 6), (4, 8)):
        yield converted(base, kind, f"keep {share}, experts {experts}, rest {rest}", 4, GROUP, predicate=by_recipe(experts, rest))
