"""This module builds a graph: nodes, small constants, and the places of weights in the data file; it reads no weights.

Weights get their places in the order in which they are announced, so the graph alone says where every byte goes.  The writer then fills the
places, and the planner learns the graph's own size without writing anything.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import EdgemoeError, MachineError
from edgemoe.targets.onnx.formats import pad

CONTRIB = "com.microsoft"
OPSET, IR_VERSION = 23, 11  # RMSNormalization is of opset 23, which ir_version 11 brought (onnx/docs/Versioning.md)
DATA_FILE = "model.onnx.data"
FLOAT, UINT8, INT32, INT64, FLOAT16 = 1, 2, 6, 7, 10  # TensorProto.DataType in onnx.proto
ITEM_BYTES = {FLOAT: 4, FLOAT16: 2, UINT8: 1}
PADDING = "edgemoe.padding"
_UNKNOWN = 10**15  # an offset or length of more digits than any real one


def import_onnx() -> Any:
    """The onnx package.

    Raises:
        MachineError: not installed.
    """
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise MachineError("onnx is not installed", hint="pip install 'edgemoe[onnx]'") from error


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a weight in the data file."""

    offset: int
    size: int


@dataclass(slots=True)
class Sheet:
    """The graph as built so far; in a `hollow` sheet, offsets and lengths are placeholders with the most digits."""

    hollow: bool = False
    data_file: str = DATA_FILE  # name of the data file in the graph
    nodes: list[Any] = field(default_factory=list)
    initializers: list[Any] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)
    end: int = 0  # bytes of data so far
    _constants: dict[str, bytes] = field(default_factory=dict)

    def weight(self, name: str, kind: int, dims: Sequence[int]) -> str:
        """Announce a weight of the data file, and return its name."""
        size = ITEM_BYTES[kind] * int(np.prod(dims))
        self.places[name] = Place(self.end, size)
        self.end += pad(size)
        self._add_initializer(name, kind, dims, self.places[name])
        return name

    def alias(self, name: str, of: str, kind: int, dims: Sequence[int]) -> str:
        """The same bytes of the data file under another name and shape."""
        self._add_initializer(name, kind, dims, self.places[of])
        return name

    def _add_initializer(self, name: str, kind: int, dims: Sequence[int], place: Place) -> None:
        onnx = import_onnx()
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=dims, data_location=onnx.TensorProto.EXTERNAL)
        offset, length = (_UNKNOWN, _UNKNOWN) if self.hollow else (place.offset, place.size)
        for key, value in (("location", self.data_file), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)

    def constant(self, name: str, values: NDArray[Any] | Sequence[int] | int | float) -> str:
        """A small constant inside the graph (integers are int64, floats are float32); a known name gives the same constant."""
        array = np.asarray(values)
        array = array.astype("<f4" if array.dtype.kind == "f" else "<i8")
        raw, kind = array.tobytes(), FLOAT if array.dtype.kind == "f" else INT64
        if name not in self._constants:
            self.initializers.append(import_onnx().TensorProto(name=name, data_type=kind, dims=array.shape, raw_data=raw))
        if self._constants.setdefault(name, raw) != raw:
            raise EdgemoeError(f"constant {name} of the graph has two values: please report this")
        return name

    def op(self, kind: str, inputs: Sequence[str], output: str | Sequence[str], domain: str = "", **attributes: Any) -> str:
        """Add a node, named like its first output, and return this output."""
        outputs = [output] if isinstance(output, str) else list(output)
        helper = import_onnx().helper
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]


def make_model(sheet: Sheet, inputs: Sequence[Any], outputs: Sequence[Any], metadata: Mapping[str, str]) -> Any:
    """The ModelProto of a finished sheet."""
    helper = import_onnx().helper
    graph = helper.make_graph(sheet.nodes, "edgemoe", inputs, outputs, sheet.initializers)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, ir_version=IR_VERSION, producer_name="edgemoe", opset_imports=opsets)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model


def pad_model(model: Any, size: int) -> Any:
    """The model with a metadata entry of spaces, so that it takes `size` bytes.

    Protobuf writes lengths in 1 to 5 bytes, so a longer value can add more than its own bytes; a longer key then fills the difference.

    Raises:
        EdgemoeError: it is larger already.
    """
    entry = model.metadata_props.add(key=PADDING, value="")
    for extra in range(8):
        entry.key, entry.value = PADDING + "." * extra, ""
        room = size - model.ByteSize()
        for length in range(room, max(room - 8, -1), -1):
            entry.value = " " * length
            if model.ByteSize() == size:
                return model
    raise EdgemoeError(f"the graph takes {model.ByteSize()} bytes, more than the {size} that were planned: please report this")
