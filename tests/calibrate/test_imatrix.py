"""Prices from an imatrix file and a table of scores: files as llama.cpp writes them, files that are wrong, and what the plans are worth."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from command import MODEL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny import flat_plan, make_checkpoint

from edgemoe.base.errors import ModelError
from edgemoe.base.storage import load_record
from edgemoe.calibrate.imatrix import MAX_HEADER, read_imatrix, save_imported_stats
from edgemoe.cli.main import main
from edgemoe.ir import Costs, Model, Plan, Stats
from edgemoe.ir.memory import peak
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.emit import emit_artifact
from edgemoe.plan.solve import solve_plan
from edgemoe.price.choices import price_choices
from edgemoe.price.imported import MAX_CSV, price_imported, read_saliency
from edgemoe.price.priors import Saliency, price_generic
from edgemoe.quantize.importance import importance_of
from edgemoe.rules import MaxFormats
from edgemoe.stream.texts import choose_texts
from edgemoe.targets import find_target
from edgemoe.verify.logits import compare_logits, reference_states, tokenize_heldout

REAL, OTHER = MODEL / "imatrix.gguf", MODEL.parent / "tiny-moe"  # by llama-imatrix of llama.cpp 0c1e570
TARGET = find_target("gguf")
Entries = dict[str, tuple[NDArray[Any], NDArray[Any]]]  # name -> sums [matrices, columns], counts [matrices]


def entries_of(model: Model, seed: int = 0) -> Entries:
    """What llama-imatrix would store: dense matrices with one count, stacks with one for each expert, the router too."""
    generator = np.random.default_rng(seed)
    tokens, entries = 4000, {}
    for layer in range(model.n_layers):
        shares = generator.dirichlet(np.full(model.n_experts, 2.0))
        count = np.floor(shares * tokens * model.top_k)
        for role, cols in (
            ("attn_q", model.hidden_size),
            ("attn_output", model.n_heads * model.head_dim),
            ("ffn_gate_inp", model.hidden_size),
        ):
            entries[f"blk.{layer}.{role}.weight"] = generator.exponential(tokens, (1, cols)), np.array([tokens])
        inside = generator.exponential(size=(model.n_experts, model.hidden_size)) * count[:, None]
        for role in ("gate", "up"):
            entries[f"blk.{layer}.ffn_{role}_exps.weight"] = inside, count
        entries[f"blk.{layer}.ffn_down_exps.weight"] = (
            generator.exponential(size=(model.n_experts, model.expert_size)) * count[:, None],
            count,
        )
    return entries


def write(path: Path, entries: Entries, *, kind: str = "imatrix", extra: dict[str, NDArray[Any]] | None = None) -> Path:
    """The file as IMatrixCollector::save_imatrix writes it (tools/imatrix/imatrix.cpp)."""
    writer = gguf.GGUFWriter(path, "none")
    del writer.kv_data[0]["general.architecture"]
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["some.txt"])
    writer.add_uint32("imatrix.chunk_count", 8)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in sorted(entries.items()):
        writer.add_tensor(f"{name}.in_sum2", np.asarray(sums, np.float32))
        writer.add_tensor(f"{name}.counts", np.asarray(counts, np.float32)[:, None])
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return inspect_model(str(make_checkpoint(tmp_path_factory.mktemp("random") / "model", "qwen3_moe")))


@pytest.fixture(scope="module")
def stats(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    folder = tmp_path_factory.mktemp("imported")
    return save_imported_stats(read_imatrix(write(folder / "i.gguf", entries_of(model)), model), model, folder)


@pytest.fixture(scope="module")
def costs(model: Model, stats: Stats) -> Costs:
    return price_imported(model, stats, TARGET, 512)


# ---------------------------------------------------------------------------------------------------------------------------- imatrix
def test_importance_is_the_files_mean_square_shrunk_to_the_layers_mean(model: Model, stats: Stats) -> None:
    entries = entries_of(model)
    for layer in range(model.n_layers):
        found = importance_of(model, stats, layer)
        for role in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            sums, count = entries[f"blk.{layer}.{role}.weight"]
            everyone = sums.sum(axis=0) / count.sum()
            expected = (sums + 64 * everyone) / (count + 64)[:, None]
            for e in range(model.n_experts):
                assert found[role, e] == pytest.approx(expected[e], rel=1e-5)
        for role in ("attn_q", "attn_k", "attn_v"):  # the file has attn_q alone
            assert found[role, -1] == pytest.approx(entries[f"blk.{layer}.attn_q.weight"][0][0] / 4000, rel=1e-5)
        assert found["attn_output", -1] == pytest.approx(entries[f"blk.{layer}.attn_output.weight"][0][0] / 4000, rel=1e-5)
    (output,) = importance_of(model, stats, -1).values()
    assert len(set(output.tolist())) == 1


def test_a_file_of_llama_imatrix_reads_as_gguf_py_reads_it() -> None:
    small = inspect_model(str(REAL.parent))
    found = read_imatrix(REAL, small)
    assert found.datasets == ("calibration.txt",)
    for tensor in gguf.GGUFReader(REAL).tensors:
        sums, counts = found.arrays(tensor.name.rsplit(".", 1)[0])
        assert np.array_equal(np.ravel(tensor.data), np.ravel(sums if tensor.name.endswith(".in_sum2") else counts))
    for layer in range(small.n_layers):
        tokens, count = (found.arrays(f"blk.{layer}.{role}.weight")[1] for role in ("attn_q", "ffn_up_exps"))
        assert count.sum() == pytest.approx(tokens[0] * small.top_k, rel=1e-3)  # dense matrices skip batches of less than 16 tokens


def test_an_output_matrix_with_statistics_is_weighed_by_them(model: Model, tmp_path: Path) -> None:
    sums = np.arange(1.0, model.hidden_size + 1)[None]
    path = write(tmp_path / "i.gguf", {**entries_of(model), "output.weight": (sums, np.array([10.0]))})
    imported = save_imported_stats(read_imatrix(path, model), model, tmp_path)
    assert importance_of(model, imported, -1)["output", -1] == pytest.approx(sums[0] / 10)


def test_experts_that_saw_little_are_cold_and_need_not_go_first(model: Model, tmp_path: Path) -> None:
    entries = entries_of(model)
    for role in ("gate", "up", "down"):
        sums, count = entries[f"blk.1.ffn_{role}_exps.weight"]
        count = np.where(np.arange(len(count)) == 3, 0, np.maximum(count, 200))
        entries[f"blk.1.ffn_{role}_exps.weight"] = np.where(count[:, None] > 0, sums, 0), count
    imported = save_imported_stats(read_imatrix(write(tmp_path / "i.gguf", entries), model), model, tmp_path)
    assert (1, 3) in imported.cold
    assert all(layer == 0 for layer, _ in set(imported.cold) - {(1, 3)})
    kept = price_imported(model, imported, TARGET, 512).kept[-2, 1]
    assert kept[3]
    assert np.isfinite(importance_of(model, imported, 1)["ffn_down_exps", 3]).all()


def spoil(name: str, change: Callable[[NDArray[Any], NDArray[Any]], tuple[NDArray[Any], NDArray[Any]] | None]) -> Callable[[Entries], None]:
    """Change the sums and counts of one matrix; None takes it away."""

    def apply(entries: Entries) -> None:
        changed = change(*entries.pop(name))
        if changed is not None:
            entries[name] = changed

    return apply


DOWN, QUERY = "blk.1.ffn_down_exps.weight", "blk.0.attn_q.weight"
WRONG = {
    "fewer experts": (spoil(DOWN, lambda s, c: (s[:-1], c[:-1])), DOWN),
    "narrower": (spoil(QUERY, lambda s, c: (s[:, :-1], c)), QUERY),
    "one count for a stack, as from .dat": (spoil(DOWN, lambda s, c: (s.reshape(1, -1), c[:1])), DOWN),
    "gone": (spoil(DOWN, lambda s, c: None), DOWN),
    "another layer": (lambda e: e.update({"blk.2.attn_q.weight": e[QUERY]}), r"blk\.2\."),
    "a layer of many digits": (lambda e: e.update({f"blk.{'9' * 40}.attn_q.weight": e[QUERY]}), "blk"),
    "NaN": (spoil(DOWN, lambda s, c: (s * np.nan, c)), DOWN),
    "infinite": (spoil(QUERY, lambda s, c: (s * np.inf, c)), QUERY),
    "negative": (spoil(QUERY, lambda s, c: (-s, c)), QUERY),
    "half a token": (spoil(DOWN, lambda s, c: (s, c + 0.5)), "count"),
    "no token": (spoil(QUERY, lambda s, c: (s, c * 0)), "layer 0 saw no token"),
}


@pytest.mark.parametrize(("change", "named"), WRONG.values(), ids=WRONG)
def test_a_file_of_another_model_or_with_impossible_values_is_refused(
    change: Callable[[Entries], None], named: str, model: Model, tmp_path: Path
) -> None:
    entries = entries_of(model)
    change(entries)
    path = write(tmp_path / "i.gguf", entries)
    with pytest.raises(ModelError, match=named) as error:
        save_imported_stats(read_imatrix(path, model), model, tmp_path)
    assert str(path) in str(error.value)


def test_other_kinds_of_files_are_refused_with_a_reason(model: Model, tmp_path: Path) -> None:
    entries = entries_of(model)
    with pytest.raises(ModelError, match=r"general\.type is 'model'"):
        read_imatrix(write(tmp_path / "model.gguf", entries, kind="model"), model)
    with pytest.raises(ModelError, match="F32 matrix"):
        read_imatrix(write(tmp_path / "half.gguf", entries, extra={"x.in_sum2": np.ones((1, 4), np.float16)}), model)
    with pytest.raises(ModelError, match="counts' is missing"):
        read_imatrix(write(tmp_path / "alone.gguf", entries, extra={"x.in_sum2": np.ones((1, 4), np.float32)}), model)
    (tmp_path / "old.dat").write_bytes(struct.pack("<i", 3) + b"\0" * 100)
    with pytest.raises(ModelError, match="not a GGUF") as error:
        read_imatrix(tmp_path / "old.dat", model)
    assert ".dat" in error.value.hint
    with pytest.raises(ModelError, match="cannot be read"):
        read_imatrix(tmp_path, model)


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


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused(data: bytes, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"i\.gguf"):
        read_imatrix(path, model)


def test_a_header_that_fills_a_large_file_is_not_read_to_its_end(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    with path.open("wb") as file:
        file.write(header(struct.pack("<Q", 2**35), values=1))
        file.truncate(2**36)  # a hole
    with pytest.raises(ModelError, match=str(MAX_HEADER)):
        read_imatrix(path, model)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_refused_or_read_but_never_crash(data: st.DataObject, tmp_path: Path) -> None:
    small, raw = inspect_model(str(REAL.parent)), bytearray(REAL.read_bytes())
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    for place in data.draw(st.lists(st.integers(0, 4000), max_size=3)):
        if place < len(raw):
            raw[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "i.gguf"
    path.write_bytes(raw)
    try:
        found = read_imatrix(path, small)
        for name in found.entries:
            found.arrays(name)
    except ModelError as error:
        assert str(path) in str(error)


# ---------------------------------------------------------------------------------------------------------------------------- saliency
def table(model: Model, *, domains: tuple[str, ...] = (), change: Callable[[list[str]], None] = lambda lines: None) -> str:
    lines = ["layer,expert,score" + (",domain" if domains else "")]
    for domain in domains or ("",):
        for layer in range(model.n_layers):
            for e in range(model.n_experts):
                lines.append(f"{layer},{e},{(1 + e) * 10**layer}" + (f",{domain}" if domain else ""))
    change(lines)
    return "\n".join(lines) + "\n"


def read(text: str, model: Model, tmp_path: Path) -> Saliency:
    path = tmp_path / "scores.csv"
    path.write_text(text, encoding="utf-8")
    return read_saliency(path, model)


def test_scores_are_shares_of_their_layer_whatever_their_unit(model: Model, tmp_path: Path) -> None:
    found = read(table(model), model, tmp_path)
    assert found.domains == ("imatrix",)
    expected = np.arange(1, model.n_experts + 1) / sum(range(1, model.n_experts + 1))
    assert found.share == pytest.approx(np.broadcast_to(expected, (1, model.n_layers, model.n_experts)))
    lines = table(model, domains=("code", "law")).splitlines()
    huge = [
        ",".join([*row[:2], f"{row[2]}e305", *row[3:]]) if row[3] == "law" else ",".join(row) for row in (x.split(",") for x in lines[1:])
    ]
    mixed = read("\r\n".join(["\ufefflayer, expert, score, domain", *huge[::-1]]), model, tmp_path)  # lines in any order
    assert mixed.domains == ("law", "code")
    assert mixed.share == pytest.approx(np.broadcast_to(expected, (2, model.n_layers, model.n_experts)))


def put(line: int, value: str) -> Callable[[list[str]], None]:
    return lambda lines: lines.__setitem__(line - 1, value)


BAD_TABLES = {
    "header": (put(1, "layer,expert,weight"), "line 1: the header"),
    "doubled": (put(4, "0,1,5"), "line 4: layer 0, expert 1 is there twice"),
    "missing": (lambda lines: lines.__delitem__(5), "layer 0, expert 4 is missing"),
    "nan": (put(7, "0,5,nan"), "line 7: score 'nan'"),
    "infinite": (put(7, "0,5,1e999"), "line 7: score"),
    "negative": (put(7, "0,5,-0.1"), "line 7: score '-0.1'"),
    "word": (put(7, "0,5,much"), "line 7: score 'much'"),
    "layer": (put(7, "2,5,1"), "line 7: layer '2' is not one of 0 to 1"),
    "expert": (put(7, "0,8,1"), "line 7: expert '8' is not one of 0 to 7"),
    "negative expert": (put(7, "0,-1,1"), "line 7: expert"),
    "endless number": (put(7, "9" * 5000 + ",1,1"), "line 7: layer"),
    "columns": (put(7, "0,5"), "line 7: 2 columns"),
    "all zero": (lambda lines: lines.__setitem__(slice(1, 9), [f"0,{e},0" for e in range(8)]), "layer 0 has no score above 0"),
    "empty": (lambda lines: lines.__delitem__(slice(1, None)), "no score"),
    "endless cell": (put(7, "0,5,1" + "0" * 200_000), "CSV"),
}


@pytest.mark.parametrize(("change", "told"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_tables_that_are_not_one_score_for_each_expert_are_refused(
    change: Callable[[list[str]], None], told: str, model: Model, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=told):
        read(table(model, change=change), model, tmp_path)


def test_tables_that_cannot_be_read_are_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="in domain 'law'"):
        read(table(model, domains=("code", "law"), change=lambda lines: lines.pop()), model, tmp_path)
    for name in ("", "\x1b[2J", "x" * 65):
        with pytest.raises(ModelError, match="line 2: domain"):
            read(table(model, domains=("code", "law"), change=put(2, f"0,0,1,{name}")), model, tmp_path)
    path = tmp_path / "scores.csv"
    path.write_bytes(b"layer,expert,score\n0,0,\xff\n")
    with pytest.raises(ModelError, match="CSV"):
        read_saliency(path, model)
    with path.open("wb") as file:
        file.truncate(MAX_CSV + 1)
    with pytest.raises(ModelError, match="too large"):
        read_saliency(path, model)
    with pytest.raises(ModelError, match="cannot be read"):
        read_saliency(tmp_path / "none.csv", model)


# ---------------------------------------------------------------------------------------------------------------------------- prices
def test_the_reference_type_costs_what_it_costs_generically_and_finer_types_less(model: Model, costs: Costs) -> None:
    generic = price_generic(model, TARGET, 512)
    f = costs.formats.index("Q4_K")
    assert costs.cost[-1, :, f] == pytest.approx(generic.cost[-1, :, f])
    order = [costs.formats.index(name) for name in ("F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ2_XXS", "IQ1_S")]
    assert (np.diff(costs.cost[-1][:, order], axis=1) > 0).all()
    assert (costs.size == generic.size).all()
    assert (np.isfinite(costs.cost) == np.isfinite(generic.cost)).all()


def test_a_stack_costs_what_its_busy_experts_lose(model: Model, tmp_path: Path) -> None:
    """Expert 0 is chosen almost alone: the stack's costs are those of a model whose experts all are like it."""
    one, entries = tmp_path / "alike", entries_of(model)
    shutil.copytree(model.folder, one)
    for layer in range(model.n_layers):
        for role in ("gate", "up", "down"):
            sums, count = entries[f"blk.{layer}.ffn_{role}_exps.weight"]
            count = np.where(np.arange(len(count)) == 0, 1e6, 1.0)
            entries[f"blk.{layer}.ffn_{role}_exps.weight"] = np.broadcast_to(sums[0], sums.shape) / sums[0].sum() * count[:, None], count
    from safetensors.torch import load_file, save_file

    weights = load_file(one / "model.safetensors")
    for name in list(weights):
        if ".experts." in name:
            weights[name] = weights[".experts.0.".join([name.split(".experts.")[0], name.split(".experts.")[1].split(".", 1)[1]])].clone()
    save_file(weights, one / "model.safetensors", metadata={"format": "pt"})
    alike, path = inspect_model(str(one)), write(tmp_path / "i.gguf", entries)
    a, b = (price_imported(m, save_imported_stats(read_imatrix(path, m), m, tmp_path / m.name), TARGET, 512) for m in (model, alike))
    stacks = [u for u, unit in enumerate(a.units) if unit.is_stack]
    assert a.cost[-1, stacks] == pytest.approx(b.cost[-1, stacks], rel=1e-3)


def test_scores_decide_who_stays_and_domains_are_the_tables(model: Model, stats: Stats, costs: Costs, tmp_path: Path) -> None:
    scored = price_imported(model, stats, TARGET, 512, read(table(model, domains=("code", "law")), model, tmp_path))
    for c, count in enumerate(scored.counts):
        assert [list(np.flatnonzero(row)) for row in scored.kept[c]] == [
            list(range(model.n_experts - count, model.n_experts))
        ] * model.n_layers
    assert scored.domains == ("code", "law")
    assert (scored.drop_cost[0, 0] < scored.drop_cost[1, 0]).all()  # of pruned GLM-5.2, code lost less
    assert "weaker" in costs.origin
    assert "code, law" in scored.origin
    assert solve_plan(scored, 10**10).origin == scored.origin


def test_the_plan_costs_less_than_one_type_in_the_same_bytes(costs: Costs) -> None:
    for bits in (5.0, 3.5, 2.5):
        budget = sum(v for k, v in costs.memory.items() if k != "context") + int(sum(u.n_weights for u in costs.units) * bits / 8)
        single = solve_plan(costs, budget, rules=(MaxFormats(at_most=1),))
        free = solve_plan(costs, single.memory["peak"])
        assert free.q < 0.9 * single.q


def test_imported_statistics_cannot_be_priced_as_measured_ones(model: Model, stats: Stats) -> None:
    with pytest.raises(ModelError, match="probes"):
        price_choices(model, stats, TARGET, 512)


# ---------------------------------------------------------------------------------------------------------------------------- command
def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["edgemoe", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(str(stop.code or 0))
    return 0


def test_the_command_wants_statistics_or_an_imatrix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = ("-o", tmp_path / "costs.json")
    assert run(monkeypatch, "price", MODEL, *out) == 2
    assert "exactly one of STATS and --imatrix" in capsys.readouterr().err
    assert run(monkeypatch, "price", MODEL, tmp_path, "--imatrix", REAL, *out) == 2
    assert run(monkeypatch, "price", MODEL, tmp_path, "--saliency", "x.csv", *out) == 2
    assert "leave --saliency out" in capsys.readouterr().err
    assert run(monkeypatch, "price", OTHER, "--imatrix", REAL, *out) == 4
    assert "imatrix.gguf" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_plan_from_an_imatrix_beats_one_type_in_llama_cpp(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = inspect_model(str(REAL.parent))
    single = flat_plan(small, "Q3_K")
    beside = {**TARGET.memory_parts(small, 512), "staging": 0}
    budget = peak({**beside, "weights": single.file_size})
    prices, chosen, out = tmp_path / "costs.json", tmp_path / "plan.json", tmp_path / "out"
    assert run(monkeypatch, "price", REAL.parent, "--imatrix", REAL, "--context", 512, "-o", prices) == 0
    shown = capsys.readouterr()
    assert "imported: " in shown.err
    folder = next(tmp_path.glob("stats-*"))
    assert str(folder) in shown.out
    assert run(monkeypatch, "plan", prices, "--memory", f"{budget}B", "-o", chosen) == 0
    assert run(monkeypatch, "emit", REAL.parent, folder, chosen, "-o", out) == 0
    plan = load_record(chosen, Plan)
    assert plan.origin.startswith("imported: ")
    assert plan.file_size <= single.file_size
    statistics = replace(load_record(folder / "stats.json", Stats), folder=str(folder))
    flat = emit_artifact(small, statistics, single, TARGET, tmp_path / "flat")
    _, texts = choose_texts([], [])
    windows = tokenize_heldout(small, texts, 1024)
    states = reference_states(small, windows, tmp_path)
    ours, theirs = (
        np.mean([s.kl_mean for s in compare_logits(path, small, windows, states, [t.name for t in texts], TARGET)])
        for path in (next(out.glob("*.gguf")), flat.path)
    )
    assert ours < 0.7 * theirs
