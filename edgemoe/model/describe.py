"""This module describes a model from its config.json alone, so that it can be planned for before any weight is downloaded.

Such a Model has shapes but no files, so it cannot be built.  It has one Tensor for each expert and projection, as a Model from
`inspect_model`, which starts from this description and finds every tensor in the files.  A trillion weights unfold in well under a second.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.base.storage import hash_json
from edgemoe.ir import Model, Tensor
from edgemoe.ir.memory import DEFAULT_CONTEXT
from edgemoe.ir.model import Cache, Expert, Layer, is_stack
from edgemoe.model.blocks import Block, Spec
from edgemoe.model.config import Config, inference_fields
from edgemoe.model.families import Family, find_shape

SHIPPED = Path(__file__).parent / "models.yaml"
# Rows of the embedding and of the output matrix belong to tokens; the last norm makes what the output matrix reads.
EMBEDDING, OUTPUT_NORM, OUTPUT = "token_embd", "output_norm", "output"


def describe(values: Mapping[str, Any], name: str = "model") -> Model:
    """A Model of shapes from a parsed config.json; its tensors have no file.

    Raises:
        ModelError: the family is not known or a field is missing; names it.
    """
    values = text_config(values)
    inference_fields(values)
    family = find_shape(values.get("model_type"))
    return describe_as(family, Config(values), name)


def describe_as(family: Family, c: Config, name: str) -> Model:
    """The Model of a config of this family; see `describe`."""
    blocks = [tuple(family.layer(c, number)) for number in range(c["num_hidden_layers"])]
    router, n_experts = family.router(c), c.experts
    if router.top_k > n_experts:
        raise ModelError(f"{c.where}: num_experts_per_tok is {router.top_k}, but there are {n_experts} experts")
    sizes = {block.kind: block.specs[0].shape[0] for layer in blocks for block in layer if block.kind in ("dense", "shared")}
    biased = any(spec.role == "ffn_down_exps.bias" for layer in blocks for block in layer for spec in block.specs)
    return Model(
        folder="",
        name=name,
        model_type=str(c.get("model_type")),
        config=dict(c.values),
        hidden_size=c["hidden_size"],
        vocab_size=c["vocab_size"],
        context_length=c.first("max_position_embeddings") if c.get("max_position_embeddings") else DEFAULT_CONTEXT,
        norm_eps=float(c.get("rms_norm_eps", 1e-6)),
        n_experts=n_experts,
        attention=family.attention(c),
        router=router,
        expert=Expert(size=c[family.expert_size], biased=biased),
        layers=tuple(_layer(layer) for layer in blocks),
        dense_size=sizes.get("dense", 0),
        shared_size=sizes.get("shared", 0),
        tensors=tuple(tensor for spec, tensor in list_tensors(family, c)),
        fingerprint=hash_json("shapes", dict(c.values), name),
    )


def _layer(blocks: tuple[Block, ...]) -> Layer:
    kinds = {block.kind: block for block in blocks}
    attention = next(kind for kind in ("gqa", "mla", "delta") if kind in kinds)
    return Layer(attention=attention, ffn="moe" if "moe" in kinds else "dense", cache=kinds[attention].cache or Cache())


def list_tensors(family: Family, c: Config) -> Iterator[tuple[Spec, Tensor]]:
    """Every tensor that a model of this config has, in file order, with its names in the checkpoint; tensors outside layers come first."""
    for spec in outer_specs(c):
        if spec.role != OUTPUT or not c.get("tie_word_embeddings", False):
            yield spec, _tensor(spec, -1)
    for number in range(c["num_hidden_layers"]):
        specs = [spec for block in family.layer(c, number) for spec in block.specs]
        stacks = [spec for spec in specs if is_stack(spec.role)]
        yield from ((spec, _tensor(spec, number)) for spec in specs if not is_stack(spec.role))
        for expert in range(c.experts if stacks else 0):
            yield from ((spec, _tensor(spec, number, expert)) for spec in stacks)


def outer_specs(c: Config) -> tuple[Spec, ...]:
    """The tensors outside the layers."""
    vocab, hidden = c["vocab_size"], c["hidden_size"]
    return (
        Spec(EMBEDDING, (vocab, hidden), ("model.embed_tokens.weight",), "tokens", "stream", planned=True),
        Spec(OUTPUT_NORM, (hidden,), ("model.norm.weight",), "", "output_norm"),
        Spec(OUTPUT, (vocab, hidden), ("lm_head.weight",), "output_norm", planned=True),
    )


def _tensor(spec: Spec, layer: int, expert: int = -1) -> Tensor:
    return Tensor(
        name=spec.role,
        role=spec.role,
        layer=layer,
        expert=expert,
        shape=spec.shape,
        dtype="BF16",
        file="",
        offset=0,
        reads=spec.reads,
        writes=spec.writes,
        planned=spec.planned,
    )


def text_config(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config that also describes vision or audio."""
    inner = values.get("text_config")
    return inner if isinstance(inner, Mapping) else values


def can_resize(model: Model, width: int) -> bool:
    """Whether a config can say that experts have `width` neurons: not where a shared expert, which stays, would be no multiple of it."""
    return not find_shape(model.model_type).shared_count or model.shared_size % width == 0


def resize_experts(model: Model, width: int) -> Model:
    """The record of the model with `width` neurons in every expert, with the config and shapes of such a checkpoint.

    The record has no place for the cut weights; `repair/width.py` adds its own files.
    """
    if width == model.expert.size:
        return model
    gate, down = (width, model.hidden_size), (model.hidden_size, width)
    tensors = tuple(replace(t, shape=down if t.role == "ffn_down_exps" else gate) if t.expert >= 0 else t for t in model.tensors)
    family = find_shape(model.model_type)
    config = {**model.config, family.expert_size: width}
    if family.shared_count:
        config[family.shared_count] = model.shared_size // width
    return replace(model, config=config, expert=replace(model.expert, size=width), tensors=tensors)


# ------------------------------------------------------------------------------------------------------------ shipped configs
@functools.cache
def _read_shipped() -> dict[str, Any]:
    import yaml

    models: dict[str, Any] = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    return models


def list_shapes() -> list[str]:
    """Names of the models whose configs are shipped."""
    return list(_read_shipped())


def load_shape(name: str) -> dict[str, Any]:
    """The config of a shipped model, in the fields of its config.json that shapes depend on.

    Raises:
        UsageError: no such model.
    """
    models = _read_shipped()
    known = {model.lower(): model for model in models}
    if name.lower() not in known:
        raise UsageError(f"shape {name!r} is not known", hint=f"known: {', '.join(models)}; or give a config.json")
    return dict(models[known[name.lower()]])
