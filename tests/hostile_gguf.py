"""Headers of GGUF files that lie about themselves."""

from __future__ import annotations

import struct


def header(*parts: bytes, tensors: int = 0, values: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + b"".join(parts)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


HOSTILE = {
    "empty": b"",
    "magic alone": b"GGUF",
    "version": b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
    "more values than there are": header(values=2**62),
    "more tensors than there are": header(tensors=2**62),
    "a name without end": header(struct.pack("<Q", 2**63), values=1),
    "an array without end": header(text("a"), struct.pack("<IIQ", 9, 4, 2**61), values=1),
    "strings without end": header(text("a"), struct.pack("<IIQ", 9, 8, 2**30), b"\0" * 99, values=1),
    "arrays of arrays": header(text("a"), struct.pack("<IIQ", 9, 9, 1) * 5000, values=1),
    "a type that is none": header(text("a"), struct.pack("<I", 77), values=1),
    "a name that is no text": header(struct.pack("<Q", 2), b"\xff\xfe", values=1),
    "dimensions without end": header(text("t"), struct.pack("<I", 2**31), tensors=1),
    "a tensor of all memory": header(text("t"), struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0), tensors=1),
    "a tensor past the end": header(text("t"), struct.pack("<IQQIQ", 2, 1, 1, 0, 2**63), tensors=1),
    "alignment 0": header(text("general.alignment"), struct.pack("<II", 4, 0), values=1),
}
