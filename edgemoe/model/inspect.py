"""This module inspects a checkpoint folder, a hub id or a GGUF and returns a Model, from headers and hashes, without needing torch."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

from edgemoe.base.errors import MachineError, ModelError, UsageError
from edgemoe.base.progress import Progress
from edgemoe.base.storage import read_json
from edgemoe.base.work import UNHASHED
from edgemoe.ir import Model, Tensor
from edgemoe.model.checkpoint import Header, list_shards, read_headers
from edgemoe.model.config import Config, inference_fields
from edgemoe.model.describe import describe_as, list_tensors
from edgemoe.model.families import Family, find_family
from edgemoe.model.gguf_model import inspect_gguf
from edgemoe.model.gguf_source import is_gguf
from edgemoe.model.hashes import hash_model
from edgemoe.model.licence import PATTERNS as LICENCE_PATTERNS

MOST_NAME = 100  # characters; names of files have more to say, and end at 255 bytes
_PIECE = 2**20  # bytes compared at a time
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def inspect_model(source: str | Path, *, hashed: bool = True, progress: Progress | None = None) -> Model:
    """Read the family, the router's rule and every tensor's place from a checkpoint, and hash its tensors.

    Args:
        source: a folder with config.json and safetensors files, a hub id such as "Qwen/Qwen3-30B-A3B", or a GGUF, of which the headers say
            less (`stream/engine/traced.py` completes its Model).
        hashed: hash every tensor, so that something can be made from the model; False: the headers alone are read.
        progress: called with (bytes hashed, all bytes) if there is something to hash.

    Raises:
        ModelError: the checkpoint is not supported or malformed; the message names the file and the field.
        MachineError: a hub id that is not in the cache and cannot be fetched.
    """
    if is_gguf(source):
        from_header = inspect_gguf(source)
        return hash_model(from_header, progress) if hashed else from_header
    folder = resolve_source(source)
    config = Config(read_json(folder / "config.json"), str(folder / "config.json"))
    family = find_family(str(config.get("model_type")))
    inference_fields(config.values, config.where)
    reason = family.refuse(config) if family.refuse else None
    if reason:
        raise ModelError(f"{config.where}: {reason}")
    header = read_headers(folder)
    config.first("max_position_embeddings")
    model = replace(describe_as(family, config, _model_name(source, folder)), folder=str(folder))
    tensors = tuple(_find_tensors(model, family, config, header))
    found = replace(model, tensors=tensors, fingerprint=UNHASHED)
    return hash_model(found, progress) if hashed else found


def resolve_source(source: str | Path) -> Path:
    """The local folder of a checkpoint: `source` itself, or a hub snapshot from the cache, which is downloaded if it is missing.

    Raises:
        UsageError: neither a folder nor a hub id.
        MachineError: a hub id that is not cached and cannot be downloaded; the hint is the command that would.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(f"{folder / 'config.json'}: is missing", hint="give the folder of a Hugging Face checkpoint")
        return folder.resolve()
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)):  # "./name" is meant as a folder
        raise UsageError(f"{source}: no such folder", hint="give a checkpoint folder, a GGUF, or a hub id such as Qwen/Qwen3-30B-A3B")
    fetch = f"hf download {source}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MachineError(f"{source}: huggingface_hub is not installed", hint=f"pip install 'edgemoe[hf]', then: {fetch}") from error
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "README.md", *LICENCE_PATTERNS]
    try:
        found = Path(snapshot_download(str(source), allow_patterns=patterns, local_files_only=True))
        list_shards(found)
        return found
    except (OSError, ValueError, ModelError):  # not cached (LocalEntryNotFoundError is both), or cached without its weights
        pass
    try:
        found = Path(snapshot_download(str(source), allow_patterns=patterns))
        list_shards(found)
        return found
    except (OSError, ValueError, RuntimeError, ModelError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MachineError(f"{source}: not in the hub cache and cannot be downloaded: {reason}", hint=f"with a network: {fetch}") from error


def _model_name(source: str | Path, folder: Path) -> str:
    """A name for files and cards; characters that file names or metadata do not allow become dashes."""
    name = str(source).split("/")[-1] if not Path(source).is_dir() else folder.name
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):  # a folder of the hub's cache
        name = folder.parent.parent.name.split("--")[-1]
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:MOST_NAME].strip("-.") or "model"


def _find_tensors(model: Model, family: Family, config: Config, header: Header) -> list[Tensor]:
    """Every tensor that the model needs, with its place; shapes are checked against the config."""
    left, tensors = dict(header), []
    stacks = _Stacks(model, family, left)
    for spec, tensor in list_tensors(family, config):
        if tensor.expert >= 0 and stacks.are_in(tensor.layer):
            tensors.append(stacks.cut(tensor))
            continue
        prefix = f"model.layers.{tensor.layer}." if tensor.layer >= 0 else ""
        names = [prefix + name.format(expert=tensor.expert) for name in spec.names]
        tensors.append(_take(model, left, next((n for n in names if n in left), names[0]), tensor))
    outer = [t for t in tensors if t.layer < 0]
    if config.get("tie_word_embeddings", False):
        outer += _other_output(model, left, outer[0])
    unknown = [n for n in left if not (n.endswith("rotary_emb.inv_freq") or (family.extra_layers and _is_beyond(model, n)))]
    if unknown:
        found = header[unknown[0]]
        cause = "config.json has the wrong number of layers or experts" if _LAYER.match(unknown[0]) else "this family does not have it"
        cause = "config.json says nothing of such a bias" if unknown[0].endswith(".bias") else cause
        raise ModelError(f"{Path(model.folder) / found[3]}: unexpected tensor {unknown[0]} ({len(unknown)} in all): {cause}")
    return [*outer, *(t for t in tensors if t.layer >= 0)]


def _other_output(model: Model, left: Header, embedding: Tensor) -> list[Tensor]:
    """The output matrix beside a tied embedding: nothing if it is a copy of the embedding, else this matrix, as in transformers 5."""
    name = "lm_head.weight"
    if name not in left:
        return []
    place = replace(embedding, role="output", reads="output_norm", writes="")
    output = _take(model, left, name, place)
    return [] if _hash_data(model, output) == _hash_data(model, embedding) else [output]


def _is_beyond(model: Model, name: str) -> bool:
    """Whether a tensor belongs to a layer after the last: a block that predicts further tokens."""
    layer = _LAYER.match(name)
    return layer is not None and int(layer[1]) >= model.n_layers


def _hash_data(model: Model, tensor: Tensor) -> bytes:
    digest = hashlib.sha256()
    with (Path(model.folder) / tensor.file).open("rb") as file:
        file.seek(tensor.offset)
        for start in range(0, tensor.n_bytes, _PIECE):
            digest.update(file.read(min(_PIECE, tensor.n_bytes - start)))
    return digest.digest()


def _take(model: Model, left: Header, name: str, tensor: Tensor) -> Tensor:
    """Take one tensor out of the header and check its shape; a vector may be a matrix of one row in the header."""
    entry = left.pop(name, None)
    if entry is None:
        raise ModelError(f"{model.folder}: tensor {name} is missing", hint="does config.json belong to these files?")
    dtype, found, offset, file = entry
    if found not in (tensor.shape, (1, *tensor.shape)):
        raise ModelError(f"{Path(model.folder) / file}: {name} has shape {list(found)}, config.json asks for {list(tensor.shape)}")
    return replace(tensor, name=name, dtype=dtype, file=file, offset=offset)


class _Stacks:
    """Experts in the stacked layout: gate_up_proj [E, 2M, H], gate rows first, and down_proj [E, H, M]."""

    def __init__(self, model: Model, family: Family, left: Header) -> None:
        self.model, self.left = model, left
        self.prefix = "model.layers.{}." + family.stacked
        self.found: dict[int, dict[str, Tensor]] = {}

    def are_in(self, layer: int) -> bool:
        """Whether a layer's experts lie in stacks."""
        return layer in self.found or self.prefix.format(layer) + "down_proj" in self.left

    def cut(self, tensor: Tensor) -> Tensor:
        """An expert's matrix as a part of its stack."""
        n, m, h = self.model.n_experts, self.model.expert.size, self.model.hidden_size
        if tensor.layer not in self.found:
            shapes = {"gate_up_proj": (n, 2 * m, h), "down_proj": (n, h, m)}
            wanted = {name: replace(tensor, expert=-1, shape=shape) for name, shape in shapes.items()}
            prefix = self.prefix.format(tensor.layer)
            self.found[tensor.layer] = {name: _take(self.model, self.left, prefix + name, whole) for name, whole in wanted.items()}
        down, up = tensor.role == "ffn_down_exps", tensor.role == "ffn_up_exps"
        whole = self.found[tensor.layer]["down_proj" if down else "gate_up_proj"]
        part = tensor.expert if down else 2 * tensor.expert + up
        step = whole.n_bytes // whole.n_weights * m * h
        return replace(tensor, name=whole.name, dtype=whole.dtype, file=whole.file, offset=whole.offset + part * step)
