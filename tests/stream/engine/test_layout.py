"""A ggml whose tensors are laid out otherwise is refused by the name of the field, and never read wrongly."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edgemoe.base.errors import MachineError
from edgemoe.stream.engine import layout
from edgemoe.stream.engine.layout import Ggml, check_layout, loaded_library, open_ggml
from edgemoe.stream.engine.runtime import load_bindings
from edgemoe.targets.gguf.formats import quantize

FIELDS = [name for name, *_ in layout.TensorStruct._fields_]


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    bindings, folder = load_bindings()
    return open_ggml(folder, bindings.GGML_TYPE_COUNT)


def test_the_installed_ggml_is_read_rightly(ggml: Ggml) -> None:
    assert check_layout(ggml) == []
    assert {"NONE", "MUL_MAT", "MUL_MAT_ID", "GET_ROWS", "GLU"} <= set(ggml.ops.values())
    assert {"f32", "bf16", "q8_0", "iq1_s", "mxfp4"} <= set(ggml.types.values())


@pytest.mark.parametrize("field", FIELDS[:-1])
def test_a_field_that_lies_elsewhere_is_noticed(ggml: Ggml, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    at, fields, kind = FIELDS.index(field), layout.TensorStruct._fields_, layout.TensorStruct
    body = {"_fields_": [*fields[:at], ("new", ctypes.c_int64), *fields[at:]], "label": kind.label, "shape": kind.shape}
    moved = type(ctypes.Structure)("Moved", (ctypes.Structure,), body)
    monkeypatch.setattr(layout, "TensorStruct", moved)
    assert check_layout(ggml)


def test_other_numbers_of_operations_are_noticed(ggml: Ggml) -> None:
    assert check_layout(dataclasses.replace(ggml, ops={number + 1: name for number, name in ggml.ops.items()})) == ["op"]


def test_the_copy_that_libllama_uses_is_chosen_beside_that_of_the_quantizers(ggml: Ggml) -> None:
    quantize(np.zeros((1, 256), np.float32), "Q4_K")  # loads libggml-base.so, which may be another file
    folder = load_bindings()[1]
    needed = {path.name for path in folder.glob("libggml-base.so.*")}
    mapped = {name for name in needed if name in Path("/proc/self/maps").read_text()}  # none, if the quantizers' copy came first
    assert loaded_library(folder).name in (mapped or {"libggml-base.so"})


def test_a_library_that_is_not_loaded_is_not_loaded_twice(tmp_path: Path) -> None:
    (tmp_path / "libggml-base.so").write_bytes(b"")
    with pytest.raises(MachineError, match="libggml-base is not loaded"):
        open_ggml(tmp_path, 43)
