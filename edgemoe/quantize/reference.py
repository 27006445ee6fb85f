"""This module holds two roundings that belong to no format: the probes' reference rounding of weights, and the kernels' int8 inputs.

A probe rounds one tensor to nearest in groups of a row and measures the KL, which says what an output error of known size costs.  `price`
computes the same error again on the same rounded weights.  The reference rounding is no storage format, so it favours none of them.
"""

from __future__ import annotations

import math

import numpy as np

from edgemoe.base.types import F32

GROUP = 32
EXPERT_BITS, OTHER_BITS = 2, 3  # of a probe of one expert stack, and of any other matrix
WHOLE_BITS = (6, 4)  # of the probes that round every matrix


def round_to_nearest(weights: F32, bits: int) -> F32:
    """Weights [..., cols] on a grid of 2^bits values between the minimum and maximum of each group of 32 (or what divides cols)."""
    group = math.gcd(weights.shape[-1], GROUP)
    x = weights.reshape(-1, group)
    low = x.min(axis=1, keepdims=True)
    step = (x.max(axis=1, keepdims=True) - low) / (2**bits - 1)
    step[step == 0] = 1
    rounded: F32 = (np.rint((x - low) / step) * step + low).astype(np.float32)
    return rounded.reshape(weights.shape)


def round_to_int8(x: F32, block: int) -> F32:
    """Inputs [n, cols] as kernels round them before a product: by block, the largest magnitude at 127; `x` itself where block is 0."""
    if not block:
        return x
    blocks = x.reshape(len(x), -1, block)
    scale = np.maximum(np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127), np.float32(1e-30))
    rounded: F32 = (np.rint(blocks / scale) * scale).astype(np.float32)
    return rounded.reshape(x.shape)
