"""What llama.cpp holds twice of a tied embedding is counted, as it does it and on every box."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from oracles import child_settings, hear_llama_cpp, predict_peak
from shapes import Tiny, gqa, write_sparse
from tiny import VOCAB_SIZE, make_checkpoint

from edgemoe.devices.detect import detect_device
from edgemoe.devices.profiles import Device, load_devices
from edgemoe.ir import Model
from edgemoe.ir.memory import Settings
from edgemoe.model.inspect import inspect_model
from edgemoe.targets import count_bytes, find_target
from edgemoe.targets.gguf.formats import OFFERED
from edgemoe.targets.gguf.memory import on_device
from edgemoe.targets.gguf.repack import ANY_CPU, held_twice_on, repacked_here
from edgemoe.targets.gguf.run import run

MIB = 2**20
VOCABULARY = 49_152
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def tied(kind: str) -> Tiny:
    """A model with a large vocabulary and no output matrix, whose embedding is of one type."""
    made = gqa(vocab=VOCABULARY, layers=2, types={"token_embd": kind, **dict.fromkeys(MATRICES, "Q8_0")})
    return dataclasses.replace(made, bpe=True, tensors={name: shape for name, shape in made.tensors.items() if name != "output.weight"})


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q6_K", "Q4_K", "IQ4_NL"])
def test_a_process_with_a_tied_embedding_holds_no_more_than_predicted_and_little_less(tmp_path: Path, kind: str) -> None:
    tiny, each = tied(kind), Settings(context=1024)
    path = write_sparse(tiny, tmp_path / "tied.gguf")
    job = {"context": each.context, "tokens": list(range(1, 200)), "prompts": [], "generate": 0, "settings": child_settings(each)}
    measured = run(path, job)["peak"]
    predicted = predict_peak(tiny.model, each, path.stat().st_size, tiny.units())
    copies = 13.5 * MIB if kind in repacked_here() else 0  # what the C library may keep of the copy while repacking, and need not
    assert measured <= predicted <= measured + copies + 9 * MIB


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q6_K", "Q4_K", "Q3_K", "IQ4_NL", "IQ4_XS"])
def test_ggml_says_which_types_it_repacks_as_llama_cpp_does_it(tmp_path: Path, kind: str) -> None:
    path = write_sparse(tied(kind), tmp_path / "tied.gguf")
    (lines,) = hear_llama_cpp(path, [child_settings(Settings(context=256))], alloc=True, repack=True)
    repacked = [float(size) for line in lines for size in re.findall(r"CPU_REPACK model buffer size = +([\d.]+)", line)]
    assert (sum(repacked) > 0) == (kind in repacked_here())


def test_what_this_machine_repacks_is_among_what_is_counted_where_no_device_is_named() -> None:
    here = repacked_here()
    assert here
    assert set(here) <= set(ANY_CPU)


def test_what_no_box_repacks_costs_a_tied_embedding_nothing(tmp_path: Path) -> None:
    extra = extra_bytes(inspect_model(make_checkpoint(tmp_path / "model", "qwen3_moe", tied=True)), None)
    assert extra["Q3_K"] == 0 == extra["F16"]
    assert extra["Q8_0"] == VOCAB_SIZE * 256 // 32 * 34


BOXES = load_devices()


@pytest.mark.parametrize(
    ("box", "twice"),
    [
        (BOXES["mac-64gb"], {"F16", "Q8_0", "Q3_K", "Q4_K"}),
        (BOXES["rpi5-16gb"], {"Q8_0", "Q4_K"}),
        (BOXES["rtx4090-128gb"], {"F16", "Q8_0", "Q3_K", "Q4_K"}),
        (dataclasses.replace(BOXES["rpi5-16gb"], cpu="x86-64, AVX2"), {"Q4_K"}),
    ],
    ids=["Metal", "ARM", "CUDA", "x86"],
)
def test_a_box_says_in_which_formats_a_tied_embedding_is_held_twice(tmp_path: Path, box: Device, twice: set[str]) -> None:
    extra = extra_bytes(inspect_model(make_checkpoint(tmp_path / "model", "qwen3_moe", tied=True)), box)
    assert {name for name in ("F16", "Q8_0", "Q3_K", "Q4_K") if extra[name]} == twice


def test_an_embedding_beside_an_output_matrix_is_never_held_twice(tmp_path: Path) -> None:
    model = inspect_model(make_checkpoint(tmp_path / "model", "qwen3_moe"))
    assert model.find("output")
    assert not any(any(extra_bytes(model, box).values()) for box in (None, *BOXES.values()))


def test_this_machine_is_asked_where_it_is_the_box() -> None:
    box = dataclasses.replace(detect_device(), backend="CPU")
    assert held_twice_on(box) == repacked_here()
    assert held_twice_on(dataclasses.replace(box, backend="CUDA, experts in RAM")).keys() == set(OFFERED)


def extra_bytes(model: Model, box: Device | None) -> dict[str, int]:
    """Bytes beyond the file's for every format of the embedding, as prices have them, or as a box has them."""
    from strategies import random_costs

    target = find_target("gguf")
    units = target.list_units(model)
    sizes = count_bytes(model, target, units, (model.n_experts,))
    costs = dataclasses.replace(
        random_costs(0, "stacks", layers=2, experts=model.n_experts),
        units=tuple(units),
        formats=target.offered,
        counts=(model.n_experts,),
        fixed_size=np.zeros(1, np.int64),
        kept=np.ones((1, 2, model.n_experts), bool),
        drop_cost=np.zeros((2, 1, 2)),
        factor=np.ones((2, len(units))),
        cost=np.where(sizes.offered[None], 1.0, np.inf),
        input_cost=np.zeros(sizes.size.shape),
        size=sizes.size,
        extra=sizes.extra,
        staging=sizes.staging,
    )
    placed = on_device(costs, box) if box else costs
    u = next(i for i, unit in enumerate(units) if unit.role == "token_embd")
    return {name: int(placed.extra[0, u, f]) for f, name in enumerate(costs.formats)}
