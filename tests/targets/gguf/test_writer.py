"""A checkpoint becomes a GGUF that gives transformers' logits, is as large as predicted, and holds what the quantizers made."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tiny import EXAMPLES, FAMILIES, edit_config, flat_plan, flat_stats, make_checkpoint, slice_experts

from edgemoe.base.errors import MachineError, ModelError
from edgemoe.ir import Artifact, Model, Plan, Tensor, is_planned, tensor_name
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.inspect import inspect_model
from edgemoe.quantize.importance import importance_of
from edgemoe.stream.passes import final_states
from edgemoe.stream.texts import SHIPPED
from edgemoe.stream.windows import Windows
from edgemoe.targets.gguf import writer
from edgemoe.targets.gguf.formats import FORMATS, OFFERED, WIDE, _ggml, dequantize, quantize, quantize_parallel, round_rows, row_bytes
from edgemoe.targets.gguf.run import check_tokenizer, run
from edgemoe.targets.gguf.writer import _open_writer, group_tensors, list_units, prepare, write

N_TOKENS = 512
MAX_KL, MIN_SAME, MAX_DIFF, LEFT_OUT = 1e-6, 0.995, 2e-2, 0.01
UNEVEN = [(0, 2, 3, 5, 7), (1, 2, 4, 5, 6)]  # kept experts of the two layers: different ones, none of them the first five


# --------------------------------------------------------------------------------------------------------------- fixtures
@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make_checkpoint(root / family, family, seed=i) for i, family in enumerate(FAMILIES)}


@pytest.fixture
def copy(sources: dict[str, Path], tmp_path: Path) -> Any:
    """A copy of a family's checkpoint that a test may spoil."""
    return lambda family: shutil.copytree(sources[family], tmp_path / "spoilt" / family)


@functools.cache
def heldout_tokens() -> tuple[int, ...]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(EXAMPLES / "tiny-moe" / "tokenizer.json"))
    texts = [(SHIPPED / "heldout" / f"{name}.txt").read_text(encoding="utf-8")[:4000] for name in ("english", "german", "python", "math")]
    return tuple(token for text in texts for token in tokenizer.encode(text, add_special_tokens=False).ids[: N_TOKENS // len(texts)])


@functools.cache
def original_logits(folder: Path) -> NDArray[np.float32]:
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}
    module = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.inference_mode():
        logits: NDArray[np.float32] = module(torch.tensor([heldout_tokens()])).logits[0].numpy()
    return logits


def llama_logits(path: Path, model: Model) -> NDArray[np.float32]:
    found = []
    job = {"windows": [list(heldout_tokens())], "vocab_size": model.vocab_size, "exact": True, "repack": False}
    run(path, job, lambda _, logits: found.append(logits))
    return found[0]


def emit(model: Model, out: Path, plan: Plan | None = None, *, seed: int | None = None, shard_max: int = 0) -> Artifact:
    out.mkdir(parents=True, exist_ok=True)
    return write(model, flat_stats(model, out / "stats", seed=seed), plan or flat_plan(model), out, shard_max)


def judge(expected: NDArray[np.float32], found: NDArray[np.float32]) -> dict[str, float]:
    """How far apart two sets of logits are.

    Both sides compute in float32 but add in another order, so that a router's tie may fall the other way: such a token has another expert
    and honestly other logits.  `max_diff` therefore leaves out the worst hundredth of the tokens; the mean KL leaves out none.
    """
    p, q = (torch.log_softmax(torch.from_numpy(x.astype(np.float64)), -1) for x in (expected, found))
    worst = np.sort(np.abs(expected - found).max(axis=1))
    return {
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "same": float((expected.argmax(1) == found.argmax(1)).mean()),
        "max_diff": float(worst[: len(worst) - int(LEFT_OUT * len(worst))][-1]),
        "worst": float(worst[-1]),
        "std": float(expected.std()),
    }


def agrees(figures: dict[str, float]) -> bool:
    return figures["kl"] <= MAX_KL and figures["same"] >= MIN_SAME and figures["max_diff"] <= MAX_DIFF


def tensor_hashes(path: Path) -> dict[str, str]:
    return {t.name: hashlib.sha256(t.data.tobytes()).hexdigest() for t in gguf.GGUFReader(path).tensors}


# ----------------------------------------------------------------------------------------------------------------- parity
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_gives_the_logits_of_transformers(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(sources[family])
    expected = original_logits(sources[family])
    figures = judge(expected, llama_logits(emit(model, tmp_path).path, model))
    print(f"parity of {family}: {figures}")  # noqa: T201
    assert 0.5 < figures["std"] < 2  # else the thresholds mean nothing
    assert agrees(figures), figures


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-moe-b"])
def test_the_bundled_models_keep_their_logits(name: str, tmp_path: Path) -> None:
    model = inspect_model(EXAMPLES / name)
    figures = judge(original_logits(EXAMPLES / name), llama_logits(emit(model, tmp_path).path, model))
    print(f"parity of {name}: {figures}")  # noqa: T201
    assert agrees(figures), figures


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_experts_equals_cutting_them_out_of_the_original(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(sources[family])
    oracle = original_logits(slice_experts(sources[family], UNEVEN, tmp_path / "oracle"))
    figures = judge(oracle, llama_logits(emit(model, tmp_path / "out", flat_plan(model, kept=UNEVEN)).path, model))
    print(f"parity of {family} with dropped experts: {figures}")  # noqa: T201
    assert agrees(figures), figures
    assert not agrees(judge(oracle, original_logits(sources[family])))  # dropping them matters


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])  # olmoe refuses: below
def test_a_tied_checkpoint_keeps_its_logits(family: str, tmp_path: Path) -> None:
    model = inspect_model(make_checkpoint(tmp_path / "tied", family, tied=True))
    assert model.find("output") is None
    artifact = emit(model, tmp_path / "out")
    assert "output.weight" not in tensor_hashes(artifact.path)
    assert agrees(figures := judge(original_logits(tmp_path / "tied"), llama_logits(artifact.path, model))), figures


@pytest.mark.parametrize("copied", [True, False])
def test_an_output_matrix_beside_a_tied_embedding_is_used_if_it_differs(copied: bool, copy: Any, tmp_path: Path) -> None:
    folder = edit_config(copy("qwen3_moe"), tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    if copied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = inspect_model(folder)
    assert (model.find("output") is None) == copied
    assert agrees(figures := judge(original_logits(folder), llama_logits(emit(model, tmp_path / "out").path, model))), figures


def test_the_older_rope_field_wins_as_in_transformers(copy: Any, tmp_path: Path) -> None:
    folder = edit_config(copy("qwen3_moe"), rope_scaling={"rope_type": "default", "rope_theta": 1000.0})  # rope_parameters says 50000
    model = inspect_model(folder)
    assert agrees(figures := judge(original_logits(folder), llama_logits(emit(model, tmp_path / "out").path, model))), figures


@pytest.mark.parametrize(("one", "other"), [("ffn_gate_exps", "ffn_up_exps"), ("attn_norm", "ffn_norm"), ("attn_q_norm", "attn_k_norm")])
def test_swapping_two_roles_would_be_seen(one: str, other: str, sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(sources["qwen3_moe"])
    other_role = {one: other, other: one}
    places = {(t.role, t.layer, t.expert): t for t in model.tensors}
    swapped = tuple(
        dataclasses.replace(places[other_role.get(t.role, t.role), t.layer, t.expert], role=t.role) if t.layer == 0 else t
        for t in model.tensors
    )
    assert swapped != model.tensors
    spoilt = dataclasses.replace(model, tensors=swapped)
    figures = judge(original_logits(sources["qwen3_moe"]), llama_logits(emit(spoilt, tmp_path).path, model))
    assert figures["kl"] > 100 * MAX_KL and not agrees(figures)


@pytest.mark.parametrize("role", ["ffn_down_exps", "attn_output"])
def test_a_transposed_square_matrix_would_be_seen(
    role: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(folder: str, tensor: Tensor) -> NDArray[np.float32]:
        weights = read_tensor(folder, tensor)
        return np.ascontiguousarray(weights.T) if (tensor.role, tensor.layer) == (role, 0) else weights

    model = inspect_model(sources["qwen3_moe"])
    monkeypatch.setattr(writer, "read_tensor", read)
    figures = judge(original_logits(sources["qwen3_moe"]), llama_logits(emit(model, tmp_path).path, model))
    assert figures["kl"] > 100 * MAX_KL and not agrees(figures)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_states_are_those_of_transformers(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModel

    model, lengths = inspect_model(sources[family]), (64, 37)
    tokens = np.array([heldout_tokens()[start : start + 64] for start in (0, 256)])
    found = final_states(model, Windows(tokens=tokens, lengths=np.array(lengths), domain=np.array([0, 1])), tmp_path)
    assert found.shape == (2, 64, model.hidden_size)
    module = AutoModel.from_pretrained(sources[family], dtype=torch.float32, attn_implementation="eager").eval()
    for row, states, length in zip(tokens, found, lengths, strict=True):  # what is padding is not compared
        with torch.inference_mode():
            expected = module(torch.from_numpy(row[None, :length])).last_hidden_state[0].numpy()
        worst = np.sort(np.abs(states[:length] - expected).max(axis=1))
        assert worst[-2] < 1e-4  # of values of size 1; one token's router may tie
    assert not list(tmp_path.iterdir())


def test_query_and_key_rows_change_places_for_mixtral_only(sources: dict[str, Path]) -> None:
    for family in FAMILIES:
        model = inspect_model(sources[family])
        for role, heads in (("attn_q", model.n_heads), ("attn_k", model.n_kv_heads), ("attn_v", model.n_kv_heads)):
            tensor = model.find(role, 1)
            assert tensor is not None
            weights = read_tensor(model.folder, tensor)
            rows = np.arange(len(weights)).reshape(heads, 2, -1).transpose(0, 2, 1).ravel()  # halves of a head -> pairs
            moved = family == "mixtral" and role != "attn_v"
            np.testing.assert_array_equal(prepare(model, tensor, weights), weights[rows] if moved else weights)


# ---------------------------------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["stacked", "sharded"])
def test_every_layout_of_a_checkpoint_gives_the_same_bytes(family: str, layout: str, sources: dict[str, Path], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "in", family, seed=FAMILIES.index(family), **{layout: True})  # type: ignore[arg-type]
    assert len(list(folder.glob("*.safetensors"))) > 1 if layout == "sharded" else not (folder / "model.safetensors.index.json").exists()
    plain, other = inspect_model(sources[family]), inspect_model(folder)
    assert [(t.role, t.layer, t.expert, t.shape) for t in plain.tensors if t.expert < 0] == [
        (t.role, t.layer, t.expert, t.shape) for t in other.tensors if t.expert < 0
    ]
    assert (other.find("ffn_up_exps", 1, 7).name == plain.find("ffn_up_exps", 1, 7).name) == (layout == "sharded")  # type: ignore[union-attr]
    kept = flat_plan(plain, "Q8_0", UNEVEN)
    first = emit(plain, tmp_path / "a", kept)
    second = emit(other, tmp_path / "b", flat_plan(other, "Q8_0", UNEVEN))
    assert tensor_hashes(first.path) == tensor_hashes(second.path)


def test_our_stacked_layout_is_the_one_that_transformers_writes(sources: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for number, family in enumerate(FAMILIES):
        ours = load_file(make_checkpoint(tmp_path / "ours" / family, family, seed=number, stacked=True) / "model.safetensors")
        module = AutoModelForCausalLM.from_pretrained(sources[family], dtype=torch.bfloat16)
        module.save_pretrained(tmp_path / "theirs" / family, save_original_format=False)
        theirs = load_file(tmp_path / "theirs" / family / "model.safetensors")
        assert set(ours) == set(theirs)
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


# --------------------------------------------------------------------------------------------------------- sizes, contents
def mixed_plan(model: Model, kept: list[tuple[int, ...]]) -> Plan:
    """Every offered format somewhere, gate, up and down of a layer differently."""
    names = ["F32", *WIDE, "Q5_1", "Q5_0", "Q4_1", "IQ4_NL", "Q4_0", "MXFP4"]
    units = list_units(model)
    return flat_plan(model, {unit.name: names[(7 * i + 3) % len(names)] for i, unit in enumerate(units)}, kept)


@pytest.mark.parametrize(("family", "kept"), [*((family, UNEVEN) for family in FAMILIES), ("qwen3_moe", None)])
def test_a_file_has_the_predicted_bytes_and_holds_what_rounding_says(
    family: str, kept: list[tuple[int, ...]] | None, sources: dict[str, Path], tmp_path: Path
) -> None:
    model = inspect_model(sources[family])
    plan = mixed_plan(model, kept or [tuple(range(model.n_experts))] * model.n_layers)
    artifact = emit(model, tmp_path, plan, seed=5)
    stats = flat_stats(model, tmp_path / "stats", seed=5)
    assert artifact.size == artifact.path.stat().st_size == plan.file_size
    assert hashlib.sha256(artifact.path.read_bytes()).hexdigest() == artifact.files[0].sha256

    reader = gguf.GGUFReader(artifact.path)
    stored = {t.name: t for t in reader.tensors}
    groups = group_tensors(model)
    assert list(stored) == [name for name, _ in groups]
    for name, group in groups:
        first, tensor = group[0], stored[name]
        experts = plan.kept[first.layer] if first.layer >= 0 else ()
        if not is_planned(first):  # norms and routers
            values = read_tensor(model.folder, first)
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            np.testing.assert_array_equal(tensor.data, values[list(experts)] if first.role == "ffn_gate_inp" else values)
            continue
        kind, importance = plan.formats[name], importance_of(model, stats, first.layer)
        assert tensor.tensor_type == FORMATS[kind].id
        assert tensor.n_bytes == len(tensor.data.tobytes()) <= plan.sizes[name] < tensor.n_bytes + 32
        packed = tensor.data.view(np.uint8).reshape(-1, first.shape[0], tensor.n_bytes // np.prod(tensor.shape[1:], dtype=int))
        for i, source in enumerate([group[e] for e in experts] if first.expert >= 0 else group):
            weights = prepare(model, source, read_tensor(model.folder, source))
            expected = round_rows(weights, kind, importance.get((source.role, source.expert)))
            np.testing.assert_array_equal(dequantize(packed[i], kind, first.shape[1]), expected, err_msg=f"{name} {kind} {source.expert}")
            if kind == "F32":
                np.testing.assert_array_equal(expected, weights)
            else:
                assert kind == "F16" or np.abs(expected - weights).max() > 0
    assert reader.get_field(f"{reader.get_field('general.architecture').contents()}.expert_count").contents() == plan.count
    flags = np.array(reader.get_field("edgemoe.experts_kept").contents()).reshape(model.n_layers, model.n_experts)
    assert [tuple(np.flatnonzero(row)) for row in flags] == [tuple(k) for k in plan.kept]
    assert reader.get_field("edgemoe.model").contents() == model.fingerprint


def test_a_models_name_counts_in_the_predicted_bytes(sources: dict[str, Path], tmp_path: Path) -> None:
    for name in ("m", "m" * 40):
        model = inspect_model(shutil.copytree(sources["mixtral"], tmp_path / name))  # the same fingerprint
        plan = flat_plan(model, "Q4_K")
        assert emit(model, tmp_path / "out", plan).size == plan.file_size


def test_the_file_type_names_the_format_that_holds_most(sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(sources["mixtral"])
    for name in FORMATS:
        kinds = {unit.name: "IQ1_S" if unit.role.startswith("attn") else name for unit in list_units(model)}
        writer = _open_writer(tmp_path / "x.gguf", model, None, flat_plan(model, kinds), 0)
        found = gguf.LlamaFileType(writer.kv_data[0]["general.file_type"].value).name
        assert found in {f"{start}_{name}{end}" for start in ("ALL", "MOSTLY") for end in ("", "_M", "_MOE")}


@pytest.mark.parametrize("name", OFFERED)
def test_our_bytes_mean_the_same_to_gguf_py(name: str) -> None:
    rows = np.random.default_rng(1).standard_normal((8, 512)).astype(np.float32)
    packed = quantize(rows, name, np.linspace(0.5, 2, 512, dtype=np.float32))
    theirs = gguf.quants.dequantize(packed.view(np.float16) if name == "F16" else packed, gguf.GGMLQuantizationType(FORMATS[name].id))
    np.testing.assert_allclose(dequantize(packed, name, 512), theirs, rtol=1e-5, atol=1e-6)
    assert np.abs(theirs - rows).mean() < 0.7  # a column's mean size is 0.8: the rows are in there


def test_the_format_table_is_ggmls() -> None:
    library = _ggml()
    library.ggml_type_size.argtypes, library.ggml_type_size.restype = [ctypes.c_int], ctypes.c_size_t
    library.ggml_blck_size.argtypes, library.ggml_blck_size.restype = [ctypes.c_int], ctypes.c_int64
    library.ggml_row_size.argtypes, library.ggml_row_size.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_size_t
    library.ggml_quantize_requires_imatrix.argtypes, library.ggml_quantize_requires_imatrix.restype = [ctypes.c_int], ctypes.c_bool
    for name, kind in FORMATS.items():
        theirs = library.ggml_blck_size(kind.id), library.ggml_type_size(kind.id), library.ggml_quantize_requires_imatrix(kind.id)
        assert (kind.block, kind.block_bytes, kind.needs_importance) == theirs, name
        assert all(row_bytes(name, cols) == library.ggml_row_size(kind.id, cols) for cols in (256, 768, 4096))
        assert library.ggml_type_name(kind.id).decode().upper() == name


@pytest.mark.parametrize("name", ["F32", "F16", "Q8_0", "Q4_K", "IQ2_XS", "IQ1_S"])
def test_rows_shared_out_over_threads_give_the_bytes_of_one_call(name: str) -> None:
    draw = np.random.default_rng(2)
    parts = [(draw.standard_normal((n, 256)).astype(np.float32), draw.exponential(size=256).astype(np.float32)) for n in (70, 33)]
    with ThreadPoolExecutor(4) as pool:
        shared = quantize_parallel(parts, name, pool, rows_each=16)
    np.testing.assert_array_equal(shared, np.concatenate([quantize(rows, name, importance) for rows, importance in parts]))


def test_rows_that_a_block_does_not_divide_are_refused() -> None:
    with pytest.raises(ModelError, match="Q4_K stores rows of multiples of 256, not of 320"):
        quantize(np.zeros((2, 320), np.float32), "Q4_K")


# ------------------------------------------------------------------------------------------------------- files, repetition
def test_split_files_load_and_give_the_same_logits(sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(sources["olmoe"])
    plan = flat_plan(model, "Q8_0")
    whole = emit(model, tmp_path / "whole", plan)
    split = emit(model, tmp_path / "split", plan, shard_max=2_000_000)
    assert len(split.files) > 2 and len(whole.files) == 1
    assert split.path.name.endswith(f"-00001-of-{len(split.files):05d}.gguf")
    assert sorted(p.name for p in (tmp_path / "split").glob("*.gguf")) == [f.name for f in split.files]
    np.testing.assert_array_equal(llama_logits(split.path, model), llama_logits(whole.path, model))


def test_writing_twice_gives_identical_bytes(sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(sources["qwen3_moe"])
    first, second = (emit(model, tmp_path / name, mixed_plan(model, UNEVEN)) for name in ("a", "b"))
    assert first.files == second.files
    assert first.path.read_bytes() == second.path.read_bytes()


def test_progress_ends_at_the_whole_and_no_scratch_is_left(sources: dict[str, Path], tmp_path: Path) -> None:
    model, seen = inspect_model(sources["mixtral"]), []
    (tmp_path / ".part").mkdir()
    (tmp_path / ".part" / "from-a-killed-run.gguf").write_bytes(b"half")
    stats = flat_stats(model, tmp_path / "stats")
    artifact = write(model, stats, flat_plan(model, "Q4_K"), tmp_path, progress=lambda *at: seen.append(at))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    assert {p.name for p in tmp_path.iterdir()} == {"stats", artifact.path.name}


def test_a_full_disk_leaves_nothing_behind(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    model = inspect_model(sources["mixtral"])
    plan, stats = flat_plan(model), flat_stats(model, tmp_path / "stats")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(MachineError, match="No space left"):
        write(model, stats, plan, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["stats"]


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-moe-b"])
def test_heldout_lines_tokenize_as_with_the_original_tokenizer(name: str, tmp_path: Path) -> None:
    model = inspect_model(EXAMPLES / name)
    lines = [line for path in sorted((SHIPPED / "heldout").glob("*.txt")) for line in path.read_text("utf-8").splitlines() if line.strip()]
    assert check_tokenizer(emit(model, tmp_path, flat_plan(model, "Q4_K")).path, model, lines[:: len(lines) // 200][:200]) == []


# --------------------------------------------------------------------------------------------------------------- refusals
REFUSED = [
    *((family, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_parameters") for family in FAMILIES),
    *((family, {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "linear") for family in FAMILIES),
    *((family, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling") for family in FAMILIES),  # beside rope_parameters
    *((family, {"rope_parameters": None}, "rope_theta") for family in FAMILIES),  # every family has another default
    *((family, {"rms_norm_eps": None}, "rms_norm_eps") for family in FAMILIES),
    *((family, {"rms_norm_eps": "1e-5"}, "rms_norm_eps") for family in FAMILIES),
    *((family, {"head_dim": 64.0}, "head_dim") for family in FAMILIES),
    *((family, {"attention_bias": True}, "attention_bias") for family in FAMILIES),
    *((family, {"hidden_act": "gelu"}, "hidden_act") for family in FAMILIES),
    *((family, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config") for family in FAMILIES),
    *((family, {"num_experts_per_tok": 9}, "num_experts_per_tok") for family in FAMILIES),
    *((family, {"num_hidden_layers": "2"}, "num_hidden_layers") for family in FAMILIES),
    *((family, {"hidden_size": None}, "hidden_size") for family in FAMILIES),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob"),  # transformers' default is false
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 128}, "sliding_window"),
    ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
    ("olmoe", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads"),
    ("mixtral", {"sliding_window": 128}, "sliding_window"),
    ("mixtral", {"model_type": "mixtral_next"}, "model_type 'mixtral_next'"),
]


@pytest.mark.parametrize(("family", "changes", "field"), REFUSED, ids=[f"{f}-{next(iter(c))}-{w}" for f, c, w in REFUSED])
def test_a_config_that_a_family_was_not_written_for_is_refused(family: str, changes: dict[str, Any], field: str, copy: Any) -> None:
    with pytest.raises(ModelError) as caught:
        inspect_model(edit_config(copy(family), **changes))
    assert field in str(caught.value) and "config.json" in str(caught.value) and caught.value.exit_code == 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [7, 9])
def test_a_wrong_number_of_experts_is_refused(family: str, count: int, copy: Any) -> None:
    folder = copy(family)
    names = [n for n in ("num_experts", "num_local_experts") if n in json.loads((folder / "config.json").read_text())]
    with pytest.raises(ModelError, match=r"experts|mlp\.gate|block_sparse_moe\.gate") as caught:
        inspect_model(edit_config(folder, **dict.fromkeys(names, count)))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_and_unknown_tensors_are_named(family: str, copy: Any) -> None:
    folder = copy(family)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.layers.0.mlp.shared_expert.up_proj.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"unexpected tensor model\.layers\.0\.mlp\.shared_expert"):
        inspect_model(folder)
    name = next(n for n in weights if ".experts.3." in n)
    save_file({n: w for n, w in weights.items() if n != name}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=f"{name} is missing"):
        inspect_model(folder)
    save_file({**weights, name: weights[name][:-1].clone()}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name} has shape \[255, 256\]"):
        inspect_model(folder)


def test_truncated_and_missing_files_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "in", "olmoe", sharded=True)
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(ModelError, match=rf"{shard.name}: file ends at byte {len(whole) - 5}"):
        inspect_model(folder)
    shard.write_bytes(whole[:6])
    with pytest.raises(ModelError, match=f"{shard.name}: not a safetensors file"):
        inspect_model(folder)
    index = folder / "model.safetensors.index.json"
    entries = index.read_text()
    index.write_text(entries.replace(shard.name, "../elsewhere.safetensors"))
    with pytest.raises(ModelError, match="not a file of this folder"):
        inspect_model(folder)
    index.write_text(entries)
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name}: shard is missing"):
        inspect_model(folder)
    index.unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        inspect_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json: is missing"):
        inspect_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_stop_the_writer(value: float, copy: Any, tmp_path: Path) -> None:
    folder = copy("qwen3_moe")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    weights[name][3, 4] = value
    save_file(weights, folder / "model.safetensors")
    model = inspect_model(folder)  # headers only: nothing is read yet
    with pytest.raises(ModelError, match=f"{name} holds 1 NaN or infinite weights"):
        emit(model, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["stats"]  # nor half a file


def test_units_are_every_matrix_but_the_routers(sources: dict[str, Path]) -> None:
    model = inspect_model(sources["olmoe"])
    roles = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    assert {u.name for u in list_units(model)} == {
        tensor_name(role, layer) for role, layer in [("token_embd", -1), ("output", -1), *((r, i) for i in range(2) for r in roles)]
    }
    flat = sum(t.n_weights for t in model.tensors if not is_planned(t))
    assert sum(u.n_weights for u in list_units(model)) + flat == model.n_weights
