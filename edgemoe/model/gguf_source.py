"""This module reads what a GGUF with experts holds, from the headers of its files alone.

Names of tensors and keys are llama.cpp's own, so one reader serves every architecture.  A tensor carries an expert axis if its name says
so and its first axis has as many entries as there are experts.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.model.gguf_header import Entry, GgufHeader, read_gguf_header

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_STACK = re.compile(r"blk\.\d+\.ffn_(?:gate|up|down|gate_up)_exps\.weight")
_EXPERT_AXIS = re.compile(
    r"ffn_(?:gate|up|down|gate_up)_exps\.(?:weight|bias|scale|input_scale)|ffn_gate_inp\.(?:weight|bias)|exp_probs_b(?:_vl)?(?:\.bias)?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """A tensor with its place; `expert_axis` says that its first axis counts experts."""

    name: str
    layer: int  # -1: outside the layers
    kind: str  # ggml's name of its type
    shape: tuple[int, ...]
    file: str
    offset: int
    n_bytes: int
    expert_axis: bool

    def slice_of(self, expert: int) -> tuple[int, int]:
        """First byte in the file, and number of bytes, of one expert's part."""
        part = self.n_bytes // self.shape[0]
        return self.offset + expert * part, part


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufSource:
    """The content of a GGUF, which may be split over several files."""

    files: tuple[Path, ...]
    name: str
    architecture: str
    n_layers: int
    n_experts: int
    top_k: int  # experts that the router picks for a token; the largest if layers differ
    n_groups: int  # of experts, as the router sees them; 1: none
    hidden_size: int
    context_length: int
    vocab_size: int
    values: dict[str, Any]  # of the first file, by key
    kinds: dict[str, tuple[int, int]]  # and the types of these values (GgufHeader)
    tensors: tuple[GgufTensor, ...]

    def of_architecture(self, key: str, default: Any = None) -> Any:
        """The value of one of the architecture's own keys."""
        return self.values.get(f"{self.architecture}.{key}", default)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have experts."""
        return tuple(sorted({t.layer for t in self.tensors if _STACK.fullmatch(t.name)}))

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def n_expert_weights(self) -> int:
        """Number of weights in stacks of experts."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors if _STACK.fullmatch(tensor.name))

    @property
    def bytes_by_type(self) -> dict[str, int]:
        """Bytes of the tensors of each type, the type with the most bytes first."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.kind] += tensor.n_bytes
        return dict(sizes.most_common())


def is_gguf(source: str | Path) -> bool:
    """Whether a source is a GGUF file, or a folder that holds GGUF files and no checkpoint of another kind."""
    path = Path(source)
    if path.is_dir():
        return not (path / "config.json").exists() and any(path.glob("*.gguf"))
    return path.suffix == ".gguf"


def read_gguf(source: str | Path) -> GgufSource:
    """What a GGUF holds.

    Args:
        source: a file, the first file of a split GGUF, or a folder that holds one GGUF.

    Raises:
        UsageError: there is no such file, or the folder holds several models.
        ModelError: a file is missing, damaged or malformed, or the model has no experts.
    """
    files = list_files(Path(source))
    headers = [read_gguf_header(path) for path in files]
    first, path = headers[0], files[0]
    arch = _text(first, "general.architecture")
    n_experts = _number(first, f"{arch}.expert_count", 0)
    tensors = tuple(_tensor(header, name, entry, n_experts) for header in headers for name, entry in header.tensors.items())
    if not n_experts or not any(_STACK.fullmatch(tensor.name) for tensor in tensors):
        raise ModelError(f"{path}: {arch} has no experts here", hint="edgemoe chooses among experts; llama-quantize serves dense models")
    _check_tensors(path, tensors)
    return GgufSource(
        files=tuple(files),
        name=_SPLIT.sub(r"\1.gguf", path.name).removesuffix(".gguf"),
        architecture=arch,
        n_layers=_number(first, f"{arch}.block_count"),
        n_experts=n_experts,
        top_k=_largest(first, f"{arch}.expert_used_count", n_experts),
        n_groups=max(_number(first, f"{arch}.expert_group_count", 1), 1),
        hidden_size=_number(first, f"{arch}.embedding_length"),
        context_length=_number(first, f"{arch}.context_length"),
        vocab_size=next((tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight"), 0),
        values=first.values,
        kinds=first.kinds,
        tensors=tensors,
    )


def list_files(source: Path) -> list[Path]:
    """All files of a GGUF, in order.

    Raises:
        UsageError: there is no such file, the folder holds several models, or the file is not the first of its set.
        ModelError: a file of a split GGUF is missing.
    """
    if source.is_dir():
        firsts = [path for path in sorted(source.glob("*.gguf")) if not (match := _SPLIT.fullmatch(path.name)) or int(match[2]) == 1]
        if len(firsts) != 1:
            names = ", ".join(path.name for path in firsts[:3]) or "none"
            raise UsageError(f"{source}: holds {len(firsts)} GGUF models ({names})", hint="give the file")
        source = firsts[0]
    if not source.is_file():
        raise UsageError(f"{source}: no such file", hint="give a GGUF file, or the first of a split set")
    match = _SPLIT.fullmatch(source.name)
    if match is None:
        return [source]
    stem, number, count = match[1], int(match[2]), int(match[3])
    if number != 1:
        raise UsageError(f"{source}: is file {number} of {count}", hint=f"give {stem}-00001-of-{count:05}.gguf")
    files = [source.with_name(f"{stem}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise ModelError(f"{missing[0]}: is missing ({len(missing)} of {count} files)", hint="download the rest of the set")
    return files


def _tensor(header: GgufHeader, name: str, entry: Entry, n_experts: int) -> GgufTensor:
    block = _BLOCK.fullmatch(name)
    axis = block is not None and _EXPERT_AXIS.fullmatch(block[2]) is not None and entry.shape[0] == n_experts
    layer = int(block[1][:9]) if block else -1
    return GgufTensor(
        name=name,
        layer=layer,
        kind=entry.kind,
        shape=entry.shape,
        file=header.path.name,
        offset=entry.offset,
        n_bytes=entry.n_bytes,
        expert_axis=axis,
    )


def _check_tensors(path: Path, tensors: tuple[GgufTensor, ...]) -> None:
    """Refuse names that two files hold, and stacks of experts that do not have as many as the metadata say."""
    counts = Counter(tensor.name for tensor in tensors)
    twice = next((name for name, n in counts.items() if n > 1), None)
    if twice:
        raise ModelError(f"{path}: two files of the set hold {twice!r}")
    other = next((t for t in tensors if _STACK.fullmatch(t.name) and not t.expert_axis), None)
    if other:
        raise ModelError(f"{path.with_name(other.file)}: {other.name!r} has shape {list(other.shape)}, which expert_count contradicts")


def _text(header: GgufHeader, key: str) -> str:
    value = header.values.get(key)
    if not isinstance(value, str) or not value.isprintable():
        raise ModelError(f"{header.path}: {key} is {value!r}, which is no name")
    return value


def _number(header: GgufHeader, key: str, default: int | None = None) -> int:
    value: Any = header.values.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise ModelError(f"{header.path}: {key} is {'missing' if value is None else repr(value)}")
    return value


def _largest(header: GgufHeader, key: str, most: int) -> int:
    """A number, or the largest of one for each layer; from 1 to `most`."""
    value: Any = header.values.get(key)
    value = max(value, default=0) if isinstance(value, list) and all(isinstance(v, int) for v in value) else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ModelError(f"{header.path}: {key} is {'missing' if value is None else repr(value)}, expected 1 to {most}")
    return value
