"""llama.cpp as a layer executor, on a tiny model of every architecture with experts: what is skipped and fed changes nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from architectures import ARCHITECTURES, N_EXPERTS, QUICK, TOP_K, make_all
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.model.gguf_source import read_gguf
from edgemoe.stream.engine.graph import VIEWS, Graph
from edgemoe.stream.engine.places import find_experts, hide_experts
from edgemoe.stream.engine.session import Seen, Session
from edgemoe.stream.engine.stream import watch_experts
from edgemoe.stream.layers import Recorder

LENGTH = 48
WINDOWS = np.random.default_rng(0).integers(1, 120, (2, LENGTH))
NOT_SLICED = ("grovemoe",)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("architectures")
    made = make_all(folder)
    assert set(made) == set(ARCHITECTURES)
    yield made
    shutil.rmtree(folder)  # 1.3 GB


@pytest.fixture
def session(files: dict[str, Path], architecture: str) -> Iterator[Session]:
    opened = Session(files[architecture], windows=2, length=LENGTH, threads=1)
    yield opened
    opened.close()


every = pytest.mark.parametrize("architecture", [a if a in QUICK else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES])


@every
def test_a_pass_that_begins_at_a_layer_and_a_layer_alone_compute_what_the_whole_pass_does(session: Session) -> None:
    graph, whole = session.graph(WINDOWS), session.run(WINDOWS)
    assert whole is not None and np.isfinite(whole).all() and whole.std() > 0.1
    for layer in graph.layers:
        start, end = graph.entries[layer], graph.exits(layer)
        values = session.live_values(WINDOWS, start)
        assert len(values) < 5
        np.testing.assert_array_equal(session.run(WINDOWS, after=start, values=values), whole)
        alone = session.live_values(WINDOWS, end, after=start, values=values)
        expected = session.live_values(WINDOWS, end)
        assert list(alone) == list(expected)
        for number, found in alone.items():
            np.testing.assert_array_equal(found, expected[number])
        other = {number: value[::-1] if value.dtype == np.float32 else value for number, value in values.items()}
        changed = session.run(WINDOWS, after=start, values=other)
        assert changed is not None and np.abs(changed - whole).max() > 1e-3  # the pass does read what it is given
    last = session.live_values(WINDOWS, graph.head)
    np.testing.assert_array_equal(session.run(WINDOWS, after=graph.head, values=last), whole)
    np.testing.assert_array_equal(session.run(WINDOWS), whole)


@every
def test_the_header_says_which_layers_have_experts(session: Session, files: dict[str, Path], architecture: str) -> None:
    source, places = read_gguf(files[architecture]), find_experts(session.graph(WINDOWS))
    assert (source.architecture, source.n_experts, source.top_k) == (architecture, N_EXPERTS, TOP_K)
    assert list(source.moe_layers) == sorted(places)
    assert {t.name for t in source.tensors if t.expert_axis} <= {t.name for t in source.tensors if N_EXPERTS in t.shape}


@every
def test_gates_times_expert_outputs_are_what_the_layer_sums(session: Session, architecture: str) -> None:
    graph, seen = session.graph(WINDOWS), dict[str, NDArray[np.float32]]()
    places = find_experts(graph)
    assert places
    for place in places.values():

        def keep(name: str, source: int = -1) -> object:
            def take(node: Seen) -> None:
                seen[name] = node.values() if source < 0 else node.source(source)

            return take

        watch = {place.outputs: keep("f"), _sum_of_slots(graph, max(place.weighted, place.outputs)): keep("sum")}
        if place.weighted >= 0:
            watch[place.weighted] = keep("gates", 1)
        session.run(WINDOWS, watch=watch)  # type: ignore[arg-type]
        assert seen["f"].shape[1] == 3
        gates = seen.get("gates", np.ones((1, 1, 1), np.float32))
        np.testing.assert_allclose((seen["f"] * gates).sum(1), seen["sum"], rtol=1e-5, atol=1e-6 * np.abs(seen["sum"]).max())
    if architecture == "llama4":  # whose gates are in the inputs
        assert "gates" not in seen
        with pytest.raises(ModelError, match="llama4"):
            watch_experts(next(iter(places.values())), Recorder())
    else:
        assert "gates" in seen


def _sum_of_slots(graph: Graph, product: int) -> int:
    """The last sum of views of a product."""
    parts = {n for n, node in enumerate(graph.nodes) if node.op in VIEWS and node.sources and node.sources[0] == product}
    found = product
    for number in range(product + 1, len(graph.nodes)):
        node = graph.nodes[number]
        if node.op == "ADD" and all(source in parts for source in node.sources):
            parts.add(number)
            found = number
    return found


@every
def test_a_model_whose_experts_are_hidden_is_the_file_without_them(session: Session, files: dict[str, Path], architecture: str) -> None:
    if architecture in NOT_SLICED:
        pytest.skip("consecutive experts share matrices: single ones cannot be cut")
    graph = session.graph(WINDOWS)
    kept = (0, 2, 3, 4, 5, 7)
    layers = list(find_experts(graph))
    hidden = session.run(WINDOWS, watch=hide_experts(graph, {layer: (1, 6) for layer in layers}))
    whole = session.run(WINDOWS)
    assert hidden is not None and whole is not None and np.abs(hidden - whole).max() > 1e-4  # they were used
    cut = Session(path := _slice(files[architecture], kept), windows=2, length=LENGTH, threads=1)
    sliced = cut.run(WINDOWS)
    cut.close()
    path.unlink()
    assert sliced is not None
    assert np.linalg.norm(sliced - hidden) < 1e-6 * np.linalg.norm(hidden)


def _slice(path: Path, kept: tuple[int, ...]) -> Path:
    """The file with some experts of each layer, by names of tensors and metadata alone."""
    reader = gguf.GGUFReader(path)
    field = reader.get_field("general.architecture")
    assert field is not None
    arch = field.contents()
    writer = gguf.GGUFWriter(out := path.with_suffix(".cut"), arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = len(kept) if name == f"{arch}.expert_count" else field.contents()
        if value != []:
            kind = field.types[0]
            writer.add_key_value(name, value, kind, sub_type=field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    pattern = re.compile(
        r"blk\.\d+\.(ffn_(gate|up|down|gate_up)_exps\.(weight|bias|scale|input_scale)|ffn_gate_inp\.(weight|bias)|exp_probs_b(_vl)?(\.bias)?)"
    )
    for tensor in reader.tensors:
        expert_axis = pattern.fullmatch(tensor.name) and tensor.data.shape[0] == N_EXPERTS
        writer.add_tensor(tensor.name, np.ascontiguousarray(tensor.data[list(kept)] if expert_axis else tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_weights_can_point_to_other_values_and_back(files: dict[str, Path]) -> None:
    session = Session(files["qwen3moe"], windows=2, length=LENGTH, threads=1)
    session.graph(WINDOWS)
    whole, name = session.run(WINDOWS), "blk.1.ffn_down_exps.weight"
    stored = next(t for t in gguf.GGUFReader(files["qwen3moe"]).tensors if t.name == name).data
    with session.pointed({name: stored}):
        np.testing.assert_array_equal(session.run(WINDOWS), whole)
    with session.pointed({name: 0 * stored}):
        changed = session.run(WINDOWS)
    assert changed is not None and whole is not None and np.abs(changed - whole).max() > 1e-3
    np.testing.assert_array_equal(session.run(WINDOWS), whole)
    with pytest.raises(ValueError, match=r"blk.1.ffn_down_exps.weight: \(3,\)"), session.pointed({name: np.zeros(3)}):
        pass
    session.close()


def test_what_a_watcher_raises_comes_out_of_the_pass(files: dict[str, Path]) -> None:
    session = Session(files["qwen3moe"], windows=2, length=LENGTH, threads=1)

    def fail(_: Seen) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        session.run(WINDOWS, watch={3: fail})
    assert session.run(WINDOWS) is not None
    session.close()
