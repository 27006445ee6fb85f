"""A checkpoint folder (or hub id) -> Model, from headers alone: no weights are read, torch is not needed."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgemoe.base.errors import MachineError, ModelError, UsageError
from edgemoe.base.storage import hash_json
from edgemoe.ir import PROJECTIONS, Model, Tensor
from edgemoe.model.checkpoint import list_shards, read_header, read_json
from edgemoe.model.families import MODULE_NAMES, OUTER_NAMES, Family, find_family

_SAMPLE = 2**20  # bytes read at the start, middle and end of each file for the fingerprint
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
Header = dict[str, tuple[str, tuple[int, ...], int, str]]  # name -> dtype, shape, offset, file


def inspect_model(source: str | Path) -> Model:
    """What a checkpoint holds: family, router rule, every tensor's place.

    Args:
        source: a folder with config.json and safetensors files, or a hub id such as "Qwen/Qwen3-30B-A3B".

    Raises:
        ModelError: not supported or malformed; names the file and the field.
        MachineError: a hub id that is not in the cache and cannot be fetched.
    """
    folder = resolve_source(source)
    config = read_json(folder / "config.json")
    family = find_family(str(config.get("model_type")))
    reason = family.refuse(config)
    if reason:
        raise ModelError(f"{folder / 'config.json'}: {reason}")
    header: Header = {}
    for shard in list_shards(folder):
        header.update({name: (*entry, shard.name) for name, entry in read_header(shard).items()})
    n_experts = _integer(folder, config, "num_experts", "num_local_experts", "n_routed_experts")
    n_heads = _integer(folder, config, "num_attention_heads")
    hidden_size = _integer(folder, config, "hidden_size")
    model = Model(
        folder=str(folder),
        name=_model_name(source, folder),
        model_type=family.model_type,
        config=config,
        n_layers=_integer(folder, config, "num_hidden_layers"),
        hidden_size=hidden_size,
        vocab_size=_integer(folder, config, "vocab_size"),
        n_heads=n_heads,
        n_kv_heads=_integer(folder, config, "num_key_value_heads"),
        head_dim=hidden_size // n_heads if config.get("head_dim") is None else _integer(folder, config, "head_dim"),
        n_experts=n_experts,
        top_k=_integer(folder, config, "num_experts_per_tok"),
        expert_size=_integer(folder, config, family.expert_size_key),
        renormalize=family.renormalize(config),
        context_length=_integer(folder, config, "max_position_embeddings"),
        tensors=(),
        fingerprint="",
    )
    if not 0 < model.top_k <= n_experts:
        raise ModelError(f"{folder / 'config.json'}: num_experts_per_tok is {model.top_k}, but there are {n_experts} experts")
    tensors = tuple(_find_tensors(model, family, header))
    return replace(model, tensors=tensors, fingerprint=_fingerprint(folder, config, header))


def resolve_source(source: str | Path) -> Path:
    """The local folder of a checkpoint: itself, or a hub snapshot from the cache, else downloaded.

    Raises:
        UsageError: neither a folder nor a hub id.
        MachineError: a hub id that is not cached and cannot be downloaded; the hint is the command that would.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(f"{folder / 'config.json'}: is missing", hint="give the folder of a Hugging Face checkpoint")
        return folder.resolve()
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise UsageError(f"{source}: no such folder", hint="give a checkpoint folder or a hub id such as Qwen/Qwen3-30B-A3B")
    fetch = f"hf download {source}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MachineError(f"{source}: huggingface_hub is not installed", hint=f"pip install 'edgemoe[hf]', then: {fetch}") from error
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "LICENSE*"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns, local_files_only=True))
    except (OSError, ValueError):  # not cached (LocalEntryNotFoundError is both)
        pass
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MachineError(f"{source}: not in the hub cache and cannot be downloaded: {reason}", hint=f"with a network: {fetch}") from error


def _model_name(source: str | Path, folder: Path) -> str:
    """A name for files and cards; characters that file names or metadata would not bear become dashes."""
    name = str(source).split("/")[-1] if not Path(source).is_dir() else folder.name
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _integer(folder: Path, config: Mapping[str, Any], *names: str) -> int:
    """The first of these config fields, which must be a positive integer."""
    for name in names:
        value = config.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ModelError(f"{folder / 'config.json'}: {name} is {value!r}, expected a positive integer")
            return value
    raise ModelError(f"{folder / 'config.json'}: {' / '.join(names)} is missing")


def _find_tensors(model: Model, family: Family, header: Header) -> list[Tensor]:
    """Every tensor that the model needs, with its role; shapes are checked against the config."""
    left = dict(header)
    tensors = []
    for role, name in OUTER_NAMES.items():
        if role == "output" and name not in left and model.config.get("tie_word_embeddings", False):
            continue
        shape = (model.hidden_size,) if role == "output_norm" else (model.vocab_size, model.hidden_size)
        tensors.append(_take(model, left, name, role, shape))
    if model.config.get("tie_word_embeddings", False):
        embedding = tensors[0]  # a copy of it is no output matrix; one that differs is used, as in transformers 5
        tensors = [t for t in tensors if t.role != "output" or _hash_data(model, t) != _hash_data(model, embedding)]
    for layer in range(model.n_layers):
        prefix = f"model.layers.{layer}."
        for role, name in family.layer_names.items():
            if prefix + name not in left and prefix + MODULE_NAMES[role] in left:
                name = MODULE_NAMES[role]  # a stacked checkpoint keeps transformers' names in memory
            tensors.append(_take(model, left, prefix + name, role, _layer_shape(model, role), layer))
        tensors += _take_experts(model, family, left, prefix, layer)
    unknown = [n for n in left if not n.endswith("rotary_emb.inv_freq")]
    if unknown:
        found = header[unknown[0]]
        extra = _LAYER.match(unknown[0])
        cause = "config.json has the wrong number of layers or experts" if extra else "this family does not have it"
        raise ModelError(f"{Path(model.folder) / found[3]}: unexpected tensor {unknown[0]} ({len(unknown)} in all): {cause}")
    return tensors


def _hash_data(model: Model, tensor: Tensor) -> bytes:
    digest = hashlib.sha256()
    with (Path(model.folder) / tensor.file).open("rb") as file:
        file.seek(tensor.offset)
        for start in range(0, tensor.n_bytes, _SAMPLE):
            digest.update(file.read(min(_SAMPLE, tensor.n_bytes - start)))
    return digest.digest()


def _layer_shape(model: Model, role: str) -> tuple[int, ...]:
    q, kv, hidden = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim, model.hidden_size
    whole_width = model.model_type == "olmoe"  # its QK-norm spans all heads
    return {
        "attn_norm": (hidden,),
        "ffn_norm": (hidden,),
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, q),
        "attn_q_norm": (q if whole_width else model.head_dim,),
        "attn_k_norm": (kv if whole_width else model.head_dim,),
        "ffn_gate_inp": (model.n_experts, hidden),
    }[role]


def _take(model: Model, left: Header, name: str, role: str, shape: tuple[int, ...], layer: int = -1, expert: int = -1) -> Tensor:
    """Take one tensor out of the header, its shape checked."""
    entry = left.pop(name, None)
    if entry is None:
        raise ModelError(f"{model.folder}: tensor {name} is missing", hint="does config.json belong to these files?")
    dtype, found, offset, file = entry
    if found != shape:
        raise ModelError(f"{Path(model.folder) / file}: {name} has shape {list(found)}, config.json asks for {list(shape)}")
    return Tensor(name=name, role=role, layer=layer, expert=expert, shape=shape, dtype=dtype, file=file, offset=offset)


def _take_experts(model: Model, family: Family, left: Header, prefix: str, layer: int) -> list[Tensor]:
    """The experts of one layer: one matrix each, or cut out of the stacked layout (gate rows first, then up rows)."""
    m, h = model.expert_size, model.hidden_size
    shapes = {"gate": (m, h), "up": (m, h), "down": (h, m)}
    stacked = prefix + family.stacked_prefix
    if stacked + "down_proj" not in left:
        return [
            _take(model, left, prefix + family.expert_names[p].format(expert=e), f"ffn_{p}_exps", shapes[p], layer, e)
            for e in range(model.n_experts)
            for p in PROJECTIONS
        ]
    both = _take(model, left, stacked + "gate_up_proj", "", (model.n_experts, 2 * m, h), layer)
    down = _take(model, left, stacked + "down_proj", "", (model.n_experts, h, m), layer)
    tensors = []
    for e in range(model.n_experts):
        for p, whole, part in (("gate", both, 2 * e), ("up", both, 2 * e + 1), ("down", down, e)):
            step = whole.n_bytes // whole.n_weights * m * h
            place = {"role": f"ffn_{p}_exps", "expert": e, "shape": shapes[p], "offset": whole.offset + part * step}
            tensors.append(Tensor(name=whole.name, layer=layer, dtype=whole.dtype, file=whole.file, **place))  # type: ignore[arg-type]
    return tensors


def _fingerprint(folder: Path, config: Mapping[str, Any], header: Header) -> str:
    """SHA-256 over config, tokenizer files, headers and a sample of the data: seconds even for a terabyte."""
    digest = hashlib.sha256(hash_json(config, sorted(header.items())).encode())
    for path in sorted(folder.iterdir()):
        if path.name.startswith(("tokenizer", "special_tokens", "chat_template")) and path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    for name in sorted({entry[3] for entry in header.values()}):
        size = (folder / name).stat().st_size
        digest.update(f"{name} {size}".encode())
        with (folder / name).open("rb") as file:
            for start in (0, max(size // 2, 0), max(size - _SAMPLE, 0)):
                file.seek(start, os.SEEK_SET)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
