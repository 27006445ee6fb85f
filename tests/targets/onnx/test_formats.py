"""ONNX weight formats: what we pack is what onnxruntime's kernels read, and rounding wastes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from edgemoe.base.errors import ModelError
from edgemoe.base.types import F32
from edgemoe.quantize.bits import pack, unpack
from edgemoe.quantize.reference import round_to_int8
from edgemoe.targets.onnx.formats import FORMATS, OFFERED, Packed, dequantize, input_block, matrix_size, piece_bytes, quantize

DENSE = [name for name in OFFERED if FORMATS[name].bits != 3]
HIDDEN, WIDTH, EXPERTS, TOP_K, TOKENS = 256, 384, 4, 2, 24


def random_rows(n: int, cols: int, seed: int = 0) -> F32:
    generator = np.random.default_rng(seed)
    channel = np.exp(generator.standard_normal(cols) / 2)
    return (generator.standard_normal((n, cols)) * channel / np.sqrt(cols)).astype(np.float32)


def run_node(node: list[Any], weights: dict[str, NDArray[Any]], feeds: dict[str, NDArray[Any]]) -> F32:
    inputs = [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()]
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(node, "one", inputs, [output], [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, ir_version=11, opset_imports=opsets)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    result: F32 = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds)[0]
    return result


def read_bits(packed: NDArray[np.uint8], bits: int, n: int) -> NDArray[np.int64]:
    """Codes of each row, bit by bit: the specification, not our unpacking."""
    stream = np.unpackbits(packed, axis=-1, bitorder="little")[:, : n * bits].reshape(len(packed), n, bits)
    return (stream * 2 ** np.arange(bits)).sum(axis=-1)


def read_packed(packed: Packed, name: str, cols: int) -> F32:
    kind = FORMATS[name]
    assert packed.scales is not None
    blocks = cols // kind.block
    codes = read_bits(packed.codes, kind.bits, cols).reshape(-1, blocks, kind.block)
    zeros = np.full((len(codes), blocks), 2 ** (kind.bits - 1)) if packed.zeros is None else read_bits(packed.zeros, kind.bits, blocks)
    values: F32 = ((codes - zeros[:, :, None]) * packed.scales.astype(np.float32)[:, :, None]).astype(np.float32)
    return values.reshape(len(codes), cols)


def relative(got: F32, want: F32) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def silu(x: F32) -> F32:
    result: F32 = x / (1 + np.exp(-x))
    return result


# ----------------------------------------------------------------------------------------------------------- the kernels
@pytest.mark.parametrize("name", OFFERED)
def test_expert_nodes_read_what_we_pack(name: str) -> None:
    kind, generator = FORMATS[name], np.random.default_rng(1)
    x = random_rows(TOKENS, HIDDEN, 2)
    gates = np.zeros((TOKENS, EXPERTS), np.float32)
    for row in gates:
        row[generator.choice(EXPERTS, TOP_K, replace=False)] = generator.random(TOP_K) + 0.1
    first = [quantize(random_rows(2 * WIDTH, HIDDEN, 10 + e), name) for e in range(EXPERTS)]
    second = [quantize(random_rows(HIDDEN, WIDTH, 20 + e), name) for e in range(EXPERTS)]
    pieces = {
        f"{piece}{n}": np.stack([getattr(p, piece) for p in ps]) for n, ps in ((1, first), (2, second)) for piece in ("codes", "scales")
    }
    zeros = ["", "", ""]
    if kind.zeros:
        pieces |= {f"zeros{n}": np.stack([p.zeros for p in ps if p.zeros is not None]) for n, ps in ((1, first), (2, second))}
        zeros = ["zeros1", "zeros2", ""]
    attributes: dict[str, Any] = {"k": TOP_K, "activation_type": "swiglu", "swiglu_fusion": 1, "normalize_routing_weights": 0}
    attributes |= {"expert_weight_bits": kind.bits, "block_size": kind.block}
    half = kind.bits == 3
    a, g = ("xh", "gh") if half else ("x", "g")
    inputs = [a, g, "codes1", "scales1", "", "codes2", "scales2", "", "", "", "", *zeros, g]
    if half:
        attributes["weights_prepacked"] = 0
    nodes = [helper.make_node("QMoE", inputs, ["yh" if half else "y"], domain="com.microsoft", **attributes)]
    if half:
        casts = [helper.make_node("Cast", [s], [t], to=to) for s, t, to in (("x", "xh", 10), ("g", "gh", 10), ("yh", "y", 1))]
        nodes = [*casts[:2], *nodes, casts[2]]
    got = run_node(nodes, pieces, {"x": x, "g": gates})

    def mixed(inputs_as: str) -> F32:
        total = np.zeros_like(x)
        for e in range(EXPERTS):
            both = round_to_int8(x, input_block(inputs_as)) @ read_packed(first[e], name, HIDDEN).T
            h = silu(both[:, 0::2]) * both[:, 1::2]
            total += gates[:, e : e + 1] * (round_to_int8(h, input_block(inputs_as)) @ read_packed(second[e], name, WIDTH).T)
        return total

    assert relative(got, mixed("F32")) < {8: 3e-2, 4: 2e-6, 3: 2e-3, 2: 3e-2}[kind.bits]
    if kind.bits == 8:  # its int8 inputs are known to the last bit, but for halves that are rounded the other way
        assert relative(got, mixed(name)) < 2e-3
    if kind.bits == 2:  # sums of four inputs are rounded: about as large an error
        assert 0.5 < relative(got, mixed("F32")) / relative(mixed(name), mixed("F32")) < 1.3


@pytest.mark.parametrize("name", DENSE)
def test_matrix_products_read_what_we_pack_and_round_their_inputs_as_we_do(name: str) -> None:
    kind, x = FORMATS[name], random_rows(TOKENS, HIDDEN, 3)
    packed = quantize(random_rows(WIDTH, HIDDEN, 4), name)
    weights: dict[str, NDArray[Any]] = {"b": packed.codes.reshape(WIDTH, HIDDEN // kind.block, -1), "s": packed.scales}  # type: ignore[dict-item]
    if packed.zeros is not None:
        weights["z"] = packed.zeros
    shape = {"K": HIDDEN, "N": WIDTH, "bits": kind.bits, "block_size": kind.block}
    want = read_packed(packed, name, HIDDEN)
    for level, inputs in ((0, x), (4, round_to_int8(x, input_block(name, "attn_q")))):
        node = helper.make_node("MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", accuracy_level=level, **shape)
        assert relative(run_node([node], weights, {"x": x}), inputs @ want.T) < 5e-5


@pytest.mark.parametrize("name", DENSE)
def test_the_embedding_looks_up_what_we_pack(name: str) -> None:
    kind, ids = FORMATS[name], np.array([[3, 0, 17], [5, 5, 63]])
    packed = quantize(random_rows(64, HIDDEN, 5), name)
    pieces = {"d": packed.codes, "s": packed.scales, "z": packed.zeros}
    weights = {k: v for k, v in pieces.items() if v is not None}
    shape = {"bits": kind.bits, "block_size": kind.block, "gather_axis": 0, "quantize_axis": 1}
    node = helper.make_node("GatherBlockQuantized", ["d", "ids", *list(weights)[1:]], ["y"], domain="com.microsoft", **shape)
    assert np.array_equal(run_node([node], weights, {"ids": ids}), read_packed(packed, name, HIDDEN)[ids])


# ------------------------------------------------------------------------------------------------------------- rounding
@given(bits=st.sampled_from([2, 3, 4, 8]), n=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_packed_codes_come_back_and_are_a_little_endian_bit_stream(bits: int, n: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, n)).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, -(-n * bits // 8))
    assert np.array_equal(read_bits(packed, bits, n), codes)
    assert np.array_equal(unpack(packed, bits, n), codes)


@given(name=st.sampled_from(OFFERED), seed=st.integers(0, 999), scale=st.sampled_from([0.03, 1.0, 1e3]))
@settings(max_examples=60, deadline=None)
def test_rounding_beats_the_plain_grid_without_shrinking_and_sizes_are_what_is_packed(name: str, seed: int, scale: float) -> None:
    kind, rows = FORMATS[name], random_rows(6, 256, seed) * np.float32(scale)
    importance = np.random.default_rng(seed).exponential(size=256).astype(np.float32)
    packed = quantize(rows, name, importance)
    assert {piece: values.nbytes for piece, values in packed.pieces().items()} == piece_bytes(name, 6, 256)
    assert np.array_equal(dequantize(packed, name, 256), read_packed(packed, name, 256))
    blocks = rows.reshape(6, -1, kind.block)
    low, high = np.minimum(blocks.min(-1, keepdims=True), 0), np.maximum(blocks.max(-1, keepdims=True), 0)
    step = (high - low) / (2**kind.bits - 1) if kind.zeros else np.maximum(high, -low) / (2 ** (kind.bits - 1) - 0.5)
    zero = np.rint(-low / step) if kind.zeros else 2 ** (kind.bits - 1)
    plain = ((np.clip(np.rint(blocks / step) + zero, 0, 2**kind.bits - 1) - zero) * step).reshape(rows.shape)

    def share(rounded: F32) -> float:
        """Of the original that the best multiple of what was rounded explains."""
        r, x = rounded.astype(np.float64).ravel(), rows.astype(np.float64).ravel()
        w = np.tile(importance.astype(np.float64), 6)
        return float((w * r * x).sum() ** 2 / (w * r * r).sum() / (w * x * x).sum())

    rounded = dequantize(packed, name, 256)
    assert 1 - share(rounded) <= 1.05 * (1 - share(plain)) + 1e-7
    if kind.bits < 8:  # nothing of the original is missing: a product loses no size
        weights = importance.astype(np.float64) * rows
        assert (weights * rounded).sum() == pytest.approx((weights * rows).sum(), rel=2e-3)


@pytest.mark.parametrize("name", [*OFFERED, "F32"])
@pytest.mark.parametrize("fill", [0.0, 1e-30, -3.0, 7e4])
def test_rows_of_one_value_survive(name: str, fill: float) -> None:
    rows = np.full((2, 256), fill, np.float32)
    tolerance = 2.0**-14 if FORMATS[name].bits == 3 else 1e-20
    assert np.allclose(dequantize(quantize(rows, name), name, 256), rows, rtol=2e-2, atol=tolerance)


def test_columns_of_more_importance_get_less_error() -> None:
    rows, importance = random_rows(64, 256, 7), np.ones(256, np.float32)
    importance[:8] = 100
    error = [((dequantize(quantize(rows, "INT2_128", i), "INT2_128", 256) - rows)[:, :8] ** 2).sum() for i in (None, importance)]
    assert error[1] < 0.8 * error[0]


def test_rows_that_the_block_does_not_divide_are_refused() -> None:
    with pytest.raises(ModelError, match="multiples of 64"):
        quantize(random_rows(2, 96), "INT4_64")
    assert matrix_size("INT4_32", 3, 96) == 192 + 64 + 64
