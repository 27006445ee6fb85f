"""This module says which tensors llama.cpp repacks, that is holds in another order than the file, for a known CPU or for this machine.

Repacking serves a CPU's vector instructions.  A repacked tensor passes through a copy while it loads.  A tied embedding is held twice:
plain, because its rows are looked up, and repacked, because the product that gives the logits needs this order.  On a GPU, the
copy for this product is always a second one.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterable, Mapping

from edgemoe.base.errors import MachineError
from edgemoe.devices.profiles import HERE, Device
from edgemoe.targets.gguf.formats import FORMATS, OFFERED, library_folder

# ggml/src/ggml-cpu/repack.cpp of llama.cpp 0c1e570: a matrix is repacked if this divides its rows.  x86: AVX2 (Q2_K: AVX-512).
# ARM: dotprod or i8mm.
X86: Mapping[str, int] = dict.fromkeys(("Q4_0", "Q4_K", "Q2_K", "IQ4_NL", "MXFP4"), 8)
ARM: Mapping[str, int] = {
    **dict.fromkeys(("Q4_0", "Q8_0", "IQ4_NL", "MXFP4"), 4),
    **dict.fromkeys(("Q2_K", "Q4_K", "Q5_K", "Q6_K"), 8),
}
ANY_CPU: Mapping[str, int] = {**X86, **ARM}  # if the CPU is not known, formats count that either kind repacks
ANY_DEVICE: Mapping[str, int] = dict.fromkeys(OFFERED, 1)  # a GPU holds a copy in every format

CPU_DEVICE, POINTER_BYTES = 0, 8  # GGML_BACKEND_DEVICE_TYPE_CPU; ggml_tensor.buffer lies behind its 4-byte type, aligned
BATCH = 512  # rows of the other operand in the product that ggml is asked about


def repacked_on(device: Device) -> Mapping[str, int]:
    """Formats that the processor of a box repacks, with the number that must divide the rows; on this machine ggml is asked if possible."""
    if device.id == HERE:
        try:
            return repacked_here()
        except MachineError:
            return ARM if platform.machine().lower().startswith(("arm", "aarch")) else X86
    return X86 if device.cpu.lower().startswith("x86") else ARM


def held_twice_on(device: Device) -> Mapping[str, int]:
    """Formats in which a box holds a tied embedding twice, with the number that must divide its rows."""
    return repacked_on(device) if device.backend == "CPU" else ANY_DEVICE


def repacked_here(names: Iterable[str] = OFFERED) -> dict[str, int]:
    """Formats that ggml repacks on this machine, with the least power of two that must divide a matrix's rows.

    The question is llama.cpp's own: does the CPU device support a product with a matrix in one of its extra buffer types?

    Raises:
        MachineError: llama-cpp-python is not installed.
    """
    base, ggml = _open_library("ggml-base"), _open_library("ggml")
    pointer = ctypes.c_void_p
    for library, name, result, arguments in (
        (base, "ggml_init", pointer, [_InitParams]),
        (base, "ggml_free", None, [pointer]),
        (base, "ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
        (base, "ggml_mul_mat", pointer, [pointer, pointer, pointer]),
        (base, "ggml_backend_buft_alloc_buffer", pointer, [pointer, ctypes.c_size_t]),
        (base, "ggml_backend_buffer_free", None, [pointer]),
        (base, "ggml_backend_dev_backend_reg", pointer, [pointer]),
        (base, "ggml_backend_reg_get_proc_address", pointer, [pointer, ctypes.c_char_p]),
        (base, "ggml_backend_dev_supports_op", ctypes.c_bool, [pointer, pointer]),
        (ggml, "ggml_backend_dev_by_type", pointer, [ctypes.c_int]),
    ):
        getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
    device = ggml.ggml_backend_dev_by_type(CPU_DEVICE)
    found = base.ggml_backend_reg_get_proc_address(base.ggml_backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts")
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(found)(device) if found else []
    kinds = list(_until_null(extra))

    def repacks(name: str, rows: int, kind: int) -> bool:
        context = base.ggml_init(_InitParams(2**20, None, True))
        matrix = base.ggml_new_tensor_2d(context, FORMATS[name].id, FORMATS[name].block * 8, rows)
        buffer = base.ggml_backend_buft_alloc_buffer(kind, 0)
        ctypes.memmove(matrix + POINTER_BYTES, ctypes.byref(pointer(buffer)), POINTER_BYTES)
        product = base.ggml_mul_mat(context, matrix, base.ggml_new_tensor_2d(context, 0, FORMATS[name].block * 8, BATCH))
        supported = bool(base.ggml_backend_dev_supports_op(device, product))
        base.ggml_backend_buffer_free(buffer)
        base.ggml_free(context)
        return supported

    least = {name: [n for n in (1, 2, 4, 8, 16, 32) if any(repacks(name, 32 + n % 32, kind) for kind in kinds)][:1] for name in names}
    return {name: rows[0] for name, rows in least.items() if rows}


def _open_library(stem: str) -> ctypes.CDLL:
    """A library of ggml, in the copy that the other libraries link to (its static variable is ggml's device registry)."""
    folder = library_folder()
    names = (f"lib{stem}.so.0", f"lib{stem}.0.dylib", f"lib{stem}.dylib", f"{stem}.dll")
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise MachineError(f"{folder}: {names[0]} is not there", hint="reinstall llama-cpp-python from source")
    return ctypes.CDLL(str(path))


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def _until_null(pointers: object) -> Iterable[int]:
    """The entries of a C array that ends with a null pointer."""
    for number in range(16):
        if not pointers or not pointers[number]:  # type: ignore[index]
            return
        yield pointers[number]  # type: ignore[index]
