"""A GGUF as the source: the same rules as transformers has, files that lose nothing where nothing changes, and builds that go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from architectures import add_predicting_block, change, make_all
from command import error_of, run_cli
from tiny import EXAMPLES, FAMILIES, flat_plan, flat_stats

from edgemoe.base.errors import ModelError
from edgemoe.base.storage import hash_file
from edgemoe.calibrate.collect import collect_stats
from edgemoe.ir import Model, Plan, Stats
from edgemoe.model.gguf_model import first_file
from edgemoe.model.gguf_source import read_gguf
from edgemoe.model.inspect import inspect_model
from edgemoe.model.tokenizer import load_tokenizer
from edgemoe.pipeline.build import open_model
from edgemoe.pipeline.request import warn_of_source
from edgemoe.pipeline.store import store_weights
from edgemoe.price import experts, matrices
from edgemoe.price.choices import price_choices
from edgemoe.repair import engine_rounding
from edgemoe.stream.engine.places import hide_experts
from edgemoe.stream.engine.session import Session
from edgemoe.stream.engine.vocabulary import load_encoder
from edgemoe.stream.texts import choose_texts
from edgemoe.targets import find_target
from edgemoe.targets.gguf.memory import memory_parts
from edgemoe.verify.logits import compare_logits, reference_states, tokenize_heldout

MODEL, GGUF, TOKENS = EXAMPLES / "tiny-moe-b", find_target("gguf"), 8192
SLICED = ("gpt-oss", "deepseek2", "nemotron_h_moe", "qwen3next", "hy_v3")  # biased, grouped, without gates, fused, and one with other names
GONE = (2, 5)


@pytest.fixture(scope="module")
def files(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model and a random one of every family, as GGUF in float32."""
    root, found = tmp_path_factory.mktemp("gguf"), {}
    for name, source in {"tiny-moe-b": MODEL, **sources}.items():
        model, folder = inspect_model(source), root / name
        folder.mkdir()
        found[name] = GGUF.write(model, flat_stats(model, folder / "stats"), flat_plan(model, "F32"), folder, 0, None).path
    return found


@pytest.fixture(scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_all(tmp_path_factory.mktemp("architectures"), SLICED)


@pytest.fixture(scope="module")
def opened(files: dict[str, Path]) -> dict[str, Model]:
    return {name: open_model(str(path)) for name, path in files.items()}


def write(model: Model, plan: Plan, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return GGUF.write(model, flat_stats(model, folder / "stats"), plan, folder, 0, None).path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_tokens_show_the_rules_that_the_config_states(family: str, opened: dict[str, Model], sources: dict[str, Path]) -> None:
    expected, found = inspect_model(sources[family]), opened[family]
    for rule in ("top_k", "scoring", "biased", "renormalize", "groups", "top_groups"):
        wanted = getattr(expected.router, rule)
        assert getattr(found.router, rule) == ("softmax" if wanted == "chosen" else wanted), rule
    assert found.router.scale == pytest.approx(expected.router.scale, rel=1e-4)
    assert (found.expert.activation, found.expert.adds, found.expert.size) == ("silu", True, expected.expert.size)
    assert (found.moe_layers, found.is_tied, found.vocab_size) == (expected.moe_layers, expected.is_tied, expected.vocab_size)
    for layer in range(expected.n_layers):
        groups = {frozenset(expected.plain_roles(layer, step)) for step in expected.steps(layer)} - {frozenset()}
        assert {frozenset(found.plain_roles(layer, step)) for step in found.steps(layer)} - {frozenset()} == groups


def test_a_gguf_is_tokenized_as_the_checkpoint(files: dict[str, Path]) -> None:
    theirs, ours = load_tokenizer(MODEL, special=True), load_encoder(files["tiny-moe-b"])
    for text in choose_texts((), ())[1]:
        for document in text.documents[:20]:
            assert ours(document) == theirs(document)


def test_all_bytes_are_kept_where_nothing_is_dropped_or_rounded(opened: dict[str, Model], tmp_path: Path) -> None:
    model = opened["tiny-moe-b"]
    plan = flat_plan(model, "F32")
    path = write(model, plan, tmp_path)
    before, after = gguf.GGUFReader(first_file(model)), gguf.GGUFReader(path)
    assert [t.name for t in before.tensors if t.name not in {a.name for a in after.tensors}] == []
    other = {t.name: t for t in after.tensors}
    for tensor in before.tensors:
        assert other[tensor.name].data.tobytes() == tensor.data.tobytes(), tensor.name
    made = ("general.file_type", "general.quantization_version", "general.architecture")
    old, new = read_gguf(first_file(model)).values, read_gguf(path).values
    kept = {key for key in old if not key.startswith(("edgemoe.", "quantize.", *made))}
    assert {key: new[key] for key in kept} == {key: old[key] for key in kept}
    units = [GGUF.unit_size(model, unit, "F32", model.n_experts) for unit in GGUF.list_units(model)]
    assert path.stat().st_size == GGUF.fixed_sizes(model, (model.n_experts,))[0] + sum(units)


@pytest.mark.parametrize("architecture", SLICED)
def test_a_file_without_some_experts_equals_the_source_that_hides_them(
    architecture: str, architectures: dict[str, Path], tmp_path: Path
) -> None:
    model = open_model(str(architectures[architecture]))
    kept = [e for e in range(model.n_experts) if e not in GONE]
    plan = flat_plan(model, "F32", [kept] * len(model.moe_layers))
    path = write(model, plan, tmp_path / "out")
    windows = np.random.default_rng(0).integers(3, model.vocab_size, (1, 48))
    found = []
    for source, gone in ((path, {}), (first_file(model), dict.fromkeys(model.moe_layers, GONE))):
        session = Session(source, windows=1, length=48, threads=1)
        found.append(session.run(windows, watch=hide_experts(session.graph(windows), gone)))
        session.close()
    assert found[0] is not None and found[1] is not None
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-6 * np.abs(found[1]).max())
    assert read_gguf(path).n_experts == len(kept)


def test_blocks_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """They are counted among the blocks, have experts, and are never run in calibration."""
    source = add_predicting_block(make_all(tmp_path, ("glm4moe",))["glm4moe"], tmp_path / "more.gguf")
    model = open_model(str(source))
    assert model.n_layers == read_gguf(source).n_layers - 1
    path = write(model, flat_plan(model, "F32"), tmp_path / "out")
    values = read_gguf(path).values
    assert (values["glm4moe.block_count"], values["glm4moe.nextn_predict_layers"]) == (model.n_layers, 0)
    windows = np.random.default_rng(0).integers(3, model.vocab_size, (1, 48))
    logits = []
    for file in (source, path):
        session = Session(file, windows=1, length=48, threads=1)
        logits.append(session.run(windows))
        session.close()
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize(
    "values",
    [
        {"attention.head_count": 3},  # llama.cpp stops the whole process
        {"tokenizer.ggml.tokens": ["a"] * 3},  # so it does here
        {"block_count": 9},
        {"embedding_length": 0},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_file_that_llama_cpp_does_not_take_is_one_line(values: dict[str, object], files: dict[str, Path], tmp_path: Path) -> None:
    source = change(files["olmoe"], tmp_path / "bad.gguf", values)
    with pytest.raises(ModelError) as refused:
        open_model(str(source))
    text = str(refused.value)
    assert text.startswith(f"{source}: ") and "\n" not in text and "/vendor/" not in text and refused.value.hint


def test_memory_is_what_llama_cpp_says_and_no_less_than_we_compute_for_the_checkpoint(opened: dict[str, Model]) -> None:
    theirs, ours = (memory_parts(model, 512) for model in (inspect_model(MODEL), opened["tiny-moe-b"]))
    assert theirs["kv"] <= ours["kv"] <= theirs["kv"] + 2**14  # the log has two digits of a MiB
    assert theirs["compute"] <= ours["compute"] <= 1.2 * theirs["compute"]
    assert (ours["output"], ours["runtime"]) == (theirs["output"], theirs["runtime"])


def test_a_tensor_keeps_its_type_at_no_loss_and_gets_none_with_more_bits(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (experts, matrices):
        monkeypatch.setattr(module, "SAMPLE_WEIGHTS", 2**12)
    model = inspect_model(sources["olmoe"])
    half = open_model(str(write(model, flat_plan(model, "Q8_0"), tmp_path / "half")))
    for unit in GGUF.list_units(half):
        offered = GGUF.offered_formats(half, unit)
        assert offered[0] == "Q8_0" and not {"F32", "F16", "BF16"} & set(offered)
    stats = collect_stats(half, choose_texts((), ())[0], tmp_path, max_tokens=1024)
    costs = price_choices(half, stats, GGUF, 512)
    own = costs.formats.index("Q8_0")
    assert (costs.cost[:, :, own] == 0).all() and (costs.cost[:, :, costs.formats.index("Q6_K")] > 0).all()


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q8_0", "Q5_K", "Q4_0", "MXFP4", "IQ2_XS"])
def test_a_tensor_that_keeps_its_type_is_copied_bit_for_bit(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(sources["olmoe"])
    source = open_model(str(write(model, flat_plan(model, lambda unit: kind if unit.is_stack else "F32"), tmp_path / "source")))
    path = write(source, flat_plan(source, lambda unit: kind if unit.is_stack else "Q8_0"), tmp_path / "again")
    found, expected = (
        {t.name: hash_tensor(t) for t in gguf.GGUFReader(p).tensors if "_exps" in t.name} for p in (path, first_file(source))
    )
    assert found == expected
    assert bool(warn_of_source(source)) == (kind not in ("BF16", "F16", "Q8_0"))


def hash_tensor(tensor: gguf.ReaderTensor) -> bytes:
    return hashlib.sha256(tensor.data.tobytes()).digest()


def test_a_split_set_is_one_source_and_can_be_split_again(sources: dict[str, Path], tmp_path: Path) -> None:
    model, most = inspect_model(sources["olmoe"]), 2**20
    whole = write(model, flat_plan(model, "Q8_0"), tmp_path / "whole")
    stats, folder = flat_stats(model, tmp_path / "stats"), make_folder(tmp_path / "split")
    GGUF.write(model, stats, flat_plan(model, "Q8_0"), folder, most, None)
    assert len(list(folder.glob("*.gguf"))) > 1
    source, out = open_model(str(folder)), make_folder(tmp_path / "out")
    again = GGUF.write(source, flat_stats(source, tmp_path / "own"), flat_plan(source, "Q8_0"), out, most, None)
    assert len(again.files) > 1 and all(file.size <= most for file in again.files)
    tensors = [t for file in again.files for t in gguf.GGUFReader(out / file.name).tensors]
    assert {t.name: hash_tensor(t) for t in tensors} == {t.name: hash_tensor(t) for t in gguf.GGUFReader(whole).tensors}
    session = Session(again.path, windows=1, length=48, threads=1)  # llama.cpp finds the other files by itself
    assert np.isfinite(session.run(np.arange(48)[None])).all()
    session.close()


@pytest.fixture(scope="module")
def calibrated(opened: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Stats, Path]:
    model, work = opened["tiny-moe-b"], tmp_path_factory.mktemp("calibrated")
    return model, collect_stats(model, choose_texts((), ())[0], work, max_tokens=TOKENS), work


def store(calibrated: tuple[Model, Stats, Path], work: Path, rounding: str = "feedback") -> Path:
    model, stats, _ = calibrated
    plan = flat_plan(model, lambda unit: "F32" if unit.layer < 0 else "Q3_K")
    stored = store_weights(model, choose_texts((), ())[0], stats, plan, work, rounding=rounding, max_tokens=TOKENS)
    return GGUF.write(stored, stats, plan, make_folder(work / "out"), 0, None).path


def test_feedback_through_llama_cpp_lowers_kl(calibrated: tuple[Model, Stats, Path]) -> None:
    (model, _, work), heldout = calibrated, choose_texts((), ())[1]
    windows = tokenize_heldout(model, heldout, 1280)
    states, kl = reference_states(model, windows, work), {}
    for rounding in ("stock", "feedback"):
        scores = compare_logits(store(calibrated, work / rounding, rounding), model, windows, states, [t.name for t in heldout], GGUF)
        kl[rounding] = float(np.mean([score.kl_mean for score in scores]))
    assert kl["feedback"] < 0.8 * kl["stock"]  # 0.45 with four times the calibration text


@pytest.mark.slow
def test_rounding_that_was_killed_goes_on_to_the_same_bytes(
    calibrated: tuple[Model, Stats, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, layer = store(calibrated, tmp_path / "whole"), engine_rounding.pack_layer
    monkeypatch.setattr(engine_rounding, "pack_layer", stop_after(layer, 1))
    with pytest.raises(KeyboardInterrupt):
        store(calibrated, tmp_path / "killed")
    monkeypatch.setattr(engine_rounding, "pack_layer", layer)
    assert hash_file(store(calibrated, tmp_path / "killed")) == hash_file(whole)


def stop_after(function: Callable[..., None], calls: int) -> Callable[..., None]:
    done = []

    def stopping(*arguments: object, **options: object) -> None:
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(function(*arguments, **options))

    return stopping


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.slow
def test_a_build_from_a_gguf_is_one_command(files: dict[str, Path], tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} speaks of rivers, of stones and of the number {i * i}." for i in range(60)))
    options = ("--calibration", text, "--calibration-tokens", 1024, "--rounding", "stock")
    done = run_cli("build", files["olmoe"], "--memory", "60MB", *options, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["measured_peak"] <= 60_000_000
    assert (out / report["artifact"]["files"][0]["name"]).stat().st_size == report["plan"]["file_size"]
    again = run_cli("verify", files["olmoe"], out, "--heldout", text)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--target", "mlx"), "a GGUF is all that can be made of it"),
        (("--width", "64"), "experts of a GGUF keep their neurons"),
        (("--top-k", "1"), "a GGUF's router picks 2"),
    ],
)
def test_what_a_gguf_cannot_have_is_refused_by_option(
    options: tuple[str, ...], reason: str, files: dict[str, Path], tmp_path: Path
) -> None:
    refused = run_cli("build", files["olmoe"], "--memory", "1GB", "-o", tmp_path / "out", *options)
    assert refused.returncode == 2 and reason in error_of(refused.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not say which cores a process may use")
def test_one_core_and_all_cores_give_the_same_bytes(opened: dict[str, Model], tmp_path: Path) -> None:
    model, texts, cores = opened["olmoe"], choose_texts((), ())[0], os.sched_getaffinity(0)
    plan, hashes = flat_plan(model, lambda unit: "Q4_K" if unit.layer < 0 else "Q3_K", [[0, 1, 3]] * len(model.moe_layers)), []
    try:
        for allowed in ({min(cores)}, cores):
            os.sched_setaffinity(0, allowed)
            work = make_folder(tmp_path / str(len(allowed)))
            stats = collect_stats(model, texts, work, max_tokens=TOKENS // 4)
            stored = store_weights(model, texts, stats, replace(plan, repair=True), work, max_tokens=TOKENS // 4)
            path = GGUF.write(stored, stats, plan, make_folder(work / "out"), 0, None).path
            hashes.append([hash_file(path), *(hash_file(file) for file in sorted(Path(stats.folder).glob("layer*.safetensors")))])
    finally:
        os.sched_setaffinity(0, cores)
    assert hashes[0] == hashes[1]
