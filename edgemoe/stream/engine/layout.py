"""This module reads and writes ggml's tensors in memory, and refuses a ggml whose tensors are laid out otherwise.

llama.cpp's evaluation callback gives a pointer to a `struct ggml_tensor`, which has no stable binary interface.  The library itself makes a
few tensors at start, and every field must be found where this module reads it.  Numbers of operations and types are never written down:
the library is asked for their names.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import MachineError

COMPUTE = 16  # GGML_TENSOR_FLAG_COMPUTE: every backend passes over a node without it; session.py tries it before relying on it
OF_WEIGHTS = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
MOST, LAST_OP = 256, "GLU"  # operations
NUMPY = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "i64": np.int64}
_POINTER, _INT, _SIZE, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_int64


class TensorStruct(ctypes.Structure):
    """ggml's `struct ggml_tensor`; `ne` counts numbers from the innermost axis, and `nb` are the bytes from one to the next."""

    _fields_ = [
        ("type", _INT),
        ("buffer", _POINTER),
        ("ne", _LONG * 4),
        ("nb", _SIZE * 4),
        ("op", _INT),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", _POINTER * 10),
        ("view_src", _POINTER),
        ("view_offs", _SIZE),
        ("data", _POINTER),
        ("name", ctypes.c_char * 64),
        ("extra", _POINTER),
        ("padding", ctypes.c_char * 8),
    ]

    @property
    def label(self) -> str:
        """Its name."""
        return bytes(self.name).decode(errors="replace")

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in numpy's order, without leading axes of one."""
        found = tuple(self.ne)[::-1]
        while len(found) > 1 and found[0] == 1:
            found = found[1:]
        return found


def struct_at(pointer: int) -> TensorStruct:
    """The struct at an address."""
    return TensorStruct.from_address(pointer)


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool)]


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_op_name": (ctypes.c_char_p, [_INT]),
    "ggml_type_name": (ctypes.c_char_p, [_INT]),
    "ggml_type_size": (_SIZE, [_INT]),
    "ggml_blck_size": (_LONG, [_INT]),
    "ggml_nbytes": (_SIZE, [_POINTER]),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_get_data": (_POINTER, [_POINTER]),
    "ggml_init": (_POINTER, [_InitParams]),
    "ggml_free": (None, [_POINTER]),
    "ggml_new_tensor_4d": (_POINTER, [_POINTER, _INT, _LONG, _LONG, _LONG, _LONG]),
    "ggml_set_name": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "ggml_view_2d": (_POINTER, [_POINTER, _POINTER, _LONG, _LONG, _SIZE, _SIZE]),
    "ggml_mul_mat": (_POINTER, [_POINTER, _POINTER, _POINTER]),
    "ggml_backend_tensor_get": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_backend_tensor_set": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_backend_buffer_get_usage": (_INT, [_POINTER]),
    "ggml_backend_buffer_is_host": (ctypes.c_bool, [_POINTER]),
}


@dataclass(frozen=True)
class Ggml:
    """The library that llama.cpp itself uses in this process, with the names of its operations and types by number."""

    library: ctypes.CDLL
    ops: dict[int, str]
    types: dict[int, str]

    def type_number(self, name: str) -> int:
        """The number of a type, by ggml's own name (f32, bf16, q8_0 ...)."""
        return next(number for number, known in self.types.items() if known == name)

    def is_weight(self, pointer: int) -> bool:
        """Whether a tensor lies in a buffer of weights."""
        buffer = struct_at(pointer).buffer
        return bool(buffer) and self.library.ggml_backend_buffer_get_usage(buffer) == OF_WEIGHTS

    def read_bytes(self, pointer: int, start: int = 0, n_bytes: int | None = None) -> NDArray[np.uint8]:
        """A copy of a tensor's bytes, or of some of them, whatever memory it lies in."""
        raw = np.empty(self.library.ggml_nbytes(pointer) if n_bytes is None else n_bytes, np.uint8)
        self.library.ggml_backend_tensor_get(pointer, raw.ctypes.data, start, raw.nbytes)
        return raw

    def read(self, pointer: int) -> NDArray[Any]:
        """A copy of the values of a tensor that is not quantized, in numpy's order of axes; a view is read with its strides."""
        tensor, raw = struct_at(pointer), self.read_bytes(pointer)
        kind = np.dtype(NUMPY[self.types[tensor.type]])
        strides = tuple(tensor.nb)[::-1]
        values = np.ndarray(tuple(tensor.ne)[::-1], kind, raw, 0, strides)
        return np.ascontiguousarray(values).reshape(tensor.shape)

    def write(self, pointer: int, values: NDArray[Any]) -> None:
        """Overwrite the values of a tensor without gaps between its rows.

        Raises:
            ValueError: it has another number of bytes.
        """
        tensor = struct_at(pointer)
        raw = np.ascontiguousarray(values, NUMPY[self.types[tensor.type]])
        if raw.nbytes != self.library.ggml_nbytes(pointer):
            raise ValueError(f"{tensor.label}: {raw.shape} for {tensor.shape}")
        self.library.ggml_backend_tensor_set(pointer, raw.ctypes.data, 0, raw.nbytes)


def open_ggml(folder: Path, n_types: int) -> Ggml:
    """The libggml-base of llama.cpp, which must be loaded, after a look at its tensors.

    Args:
        folder: of llama-cpp-python's shared libraries.
        n_types: number of ggml's types, as the bindings know it.

    Raises:
        MachineError: the library is not loaded, or its tensors are laid out otherwise.
    """
    library = ctypes.CDLL(str(loaded_library(folder)))
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise MachineError(f"{folder}: ggml has no {name}", hint=_HINT) from error
        function.restype, function.argtypes = result, arguments
    ops, types = _op_names(library), {n: name.decode() for n in range(n_types) if (name := library.ggml_type_name(n))}
    ggml = Ggml(library, ops, types)
    if wrong := check_layout(ggml):
        raise MachineError(f"{folder}: ggml lays out its tensors otherwise: {', '.join(wrong)}", hint=_HINT)
    return ggml


_HINT = "install the version of llama-cpp-python that constraints.txt names"


def loaded_library(folder: Path) -> Path:
    """The file of the libggml-base that libllama has loaded; the folder may hold the same file by other names, which would load twice."""
    if sys.platform == "linux":
        mapped = {Path(line.split(maxsplit=5)[-1]) for line in Path("/proc/self/maps").read_text(errors="replace").splitlines()}
        found = sorted(path for path in mapped if path.name.startswith("libggml-base") and path.parent == folder.resolve())
        if not found:
            raise MachineError(f"{folder}: libggml-base is not loaded", hint=_HINT)
        return found[-1]  # libllama asks for it by its version, and the file without one may be another copy
    names = ("libggml-base.0.dylib", "libggml-base.dylib", "ggml-base.dll")
    there = next((folder / name for name in names if (folder / name).exists()), None)
    if there is None:
        raise MachineError(f"{folder}: libggml-base is not there", hint=_HINT)
    return there


def _op_names(library: Any) -> dict[int, str]:
    """Names of operations by number, up to the last that llama.cpp's graphs hold; ggml itself reads past its table beyond the end."""
    found: dict[int, str] = {}
    for number in range(MOST):
        name = library.ggml_op_name(number)
        found[number] = name.decode(errors="replace") if name else ""
        if found[number] in ("", LAST_OP):
            break
    return found


def check_layout(ggml: Ggml) -> list[str]:
    """Fields of tensors, made by the library, that are not where this module reads them; empty: all are."""
    lib = ggml.library
    context = lib.ggml_init(_InitParams(2**20, None, False))
    f32, f16 = ggml.type_number("f32"), ggml.type_number("f16")
    a = lib.ggml_new_tensor_4d(context, f32, 32, 5, 7, 11)
    lib.ggml_set_name(a, b"layout-check")
    b = lib.ggml_new_tensor_4d(context, f16, 32, 6, 7, 11)
    v = lib.ggml_view_2d(context, a, 8, 3, 256, 64)
    m = lib.ggml_mul_mat(context, a, b)
    ta, tb, tv, tm = (struct_at(pointer) for pointer in (a, b, v, m))
    found = {
        "size": ctypes.sizeof(TensorStruct) + 32 == lib.ggml_tensor_overhead(),
        "type": (ta.type, tb.type) == (f32, f16),
        "ne": list(ta.ne) == [32, 5, 7, 11] and list(tm.ne) == [5, 6, 7, 11],
        "nb": list(ta.nb) == [4, 128, 640, 4480] and list(tb.nb) == [2, 64, 384, 2688] and list(tv.nb)[:2] == [4, 256],
        "name": ta.label == "layout-check",
        "buffer": ta.buffer is None,
        "data": ta.data == lib.ggml_get_data(a) and tv.data == ta.data + 64,
        "view_src": ta.view_src is None and tv.view_src == a,
        "view_offs": tv.view_offs == 64,
        "op": (ggml.ops.get(ta.op), ggml.ops.get(tv.op), ggml.ops.get(tm.op)) == ("NONE", "VIEW", "MUL_MAT"),
        "src": (tv.src[0], tm.src[0], tm.src[1], tm.src[2]) == (a, a, b, None),
        "extra": ta.extra is None and tm.extra is None,
    }
    lib.ggml_free(context)
    return [field for field, right in found.items() if not right]
