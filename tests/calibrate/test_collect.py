"""Statistics of a trained model, against transformers and against themselves after a kill."""

from pathlib import Path

import numpy as np
import pytest
import torch
from command import MODEL

from edgemoe.base.errors import ModelError
from edgemoe.base.storage import FORMAT_VERSION, load_record
from edgemoe.calibrate.collect import _choose_replay, collect_stats
from edgemoe.calibrate.observer import fisher_of_states
from edgemoe.ir import Model, Stats
from edgemoe.model.inspect import inspect_model
from edgemoe.price.saliency import SCORES, score_experts
from edgemoe.quantize.importance import importance_of
from edgemoe.stream.layers import apply_norm
from edgemoe.stream.texts import SHIPPED, Text, read_text
from edgemoe.stream.windows import tokenize

TOKENS = 4096


@pytest.fixture(scope="module")
def model() -> Model:
    return inspect_model(MODEL)


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    paths = [SHIPPED / "calibration" / f"{name}.txt" for name in ("english", "math")]
    return [Text(name=t.name, documents=t.documents, weight=w) for t, w in zip(map(read_text, map(str, paths)), (3.0, 1.0), strict=True)]


@pytest.fixture(scope="module")
def stats(model: Model, texts: list[Text], tmp_path_factory: pytest.TempPathFactory) -> Stats:
    return collect_stats(model, texts, tmp_path_factory.mktemp("work"), max_tokens=TOKENS)


def test_counts_and_gates_are_those_of_the_original_router(model: Model, stats: Stats, texts: list[Text]) -> None:
    from transformers import AutoModelForCausalLM

    windows = tokenize(model, texts, TOKENS, 512)
    original = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    original.model.layers[1].mlp.gate.register_forward_hook(lambda _, __, out: seen.append(out[2].reshape(-1, model.top_k)))
    expected = np.zeros((2, model.n_experts), np.int64)
    with torch.no_grad():
        for row, length, domain in zip(windows.tokens, windows.lengths, windows.domain, strict=True):
            seen.clear()
            original(torch.from_numpy(row[:length])[None])
            np.add.at(expected[domain], seen[0].numpy().ravel(), 1)
    found = stats.arrays(1)["count"]
    assert found.sum() == expected.sum() == 2 * windows.lengths.sum()
    assert np.abs(found - expected).sum() <= 0.005 * expected.sum()  # a tie may fall the other way


def test_replay_tokens_know_the_square_of_their_stream(model: Model, stats: Stats, texts: list[Text]) -> None:
    from transformers import AutoModelForCausalLM

    windows = tokenize(model, texts, TOKENS, 512)
    places = _choose_replay(windows, stats.weights)
    original = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    expected = []
    for window, position in zip(*places[:: len(places) // 8].T, strict=True):
        tokens = torch.from_numpy(windows.tokens[window, : position + 1])[None]
        with torch.no_grad():
            after = original(tokens, output_hidden_states=True).hidden_states[1]
        expected.append(float(after[0, position].square().sum()))
    np.testing.assert_allclose(stats.arrays(0)["replay_stream"][:: len(places) // 8], expected, rtol=1e-3)


def test_the_fisher_trace_is_what_small_changes_of_a_state_cost() -> None:
    hidden, vocab = 48, 200
    draw = torch.Generator().manual_seed(1)
    states, norm = (
        torch.tensor([[1.0], [2], [4], [8]]) * torch.randn(4, hidden, generator=draw).double(),
        torch.rand(hidden, generator=draw).double() + 0.5,
    )
    output = 0.4 * torch.randn(vocab, hidden, generator=draw).double() * torch.tensor([1.0, 0.2]).repeat(vocab // 2)[:, None]
    log_p = (apply_norm(states, norm, 0.0) @ output.T).log_softmax(-1)
    step = 1e-3
    changed = states[:, None] + step * torch.eye(hidden, dtype=torch.float64)  # one channel at a time: the mean over directions
    after = (apply_norm(changed, norm, 0.0) @ output.T).log_softmax(-1)
    kl = (log_p.exp()[:, None] * (log_p[:, None] - after)).sum(-1).mean(dim=1)
    found = fisher_of_states(states, norm, output, 0.0)
    assert found.max() > 10 * found.min()
    torch.testing.assert_close(found, 2 * kl / step**2, rtol=0.1, atol=0.0)  # the direction that the norm takes out is one of 48


def test_padding_is_not_counted(model: Model, stats: Stats, texts: list[Text]) -> None:
    windows = tokenize(model, [Text(name="short", documents=("A short text of a few words.",))], TOKENS, 512)
    assert windows.tokens.shape == (1, 512)
    assert 2 < windows.lengths[0] < 20
    assert stats.arrays(0)["tokens"].sum() == tokenize(model, texts, TOKENS, 512).lengths.sum()


def test_importance_is_positive_and_finite_for_every_expert(model: Model, stats: Stats) -> None:
    for layer in range(model.n_layers):
        for values in importance_of(model, stats, layer).values():
            assert np.isfinite(values).all()
            assert (values >= 0).all() and values.max() > 0


def test_every_published_score_ranks_every_expert(stats: Stats) -> None:
    for name in SCORES:
        score = score_experts(stats, 0, name)
        assert np.isfinite(score).all() and len(set(score.tolist())) > 1


def test_a_killed_calibration_goes_on_and_gives_the_same_numbers(model: Model, stats: Stats, texts: list[Text], tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 1:
            raise Killed

    with pytest.raises(Killed):
        collect_stats(model, texts, tmp_path, max_tokens=TOKENS, progress=kill)
    resumed = collect_stats(model, texts, tmp_path, max_tokens=TOKENS)
    assert resumed.probes == stats.probes
    for layer in (-1, 0, 1):
        first, second = stats.arrays(layer), resumed.arrays(layer)
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[name], second[name]) for name in first)


def test_statistics_of_an_older_format_are_made_again_in_a_build_and_refused_elsewhere(
    model: Model, stats: Stats, texts: list[Text], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgemoe.base.storage.FORMAT_VERSION", FORMAT_VERSION - 1)
    monkeypatch.setattr("edgemoe.calibrate.collect.FORMAT_VERSION", FORMAT_VERSION - 1)
    old = collect_stats(model, texts, tmp_path, max_tokens=512)
    monkeypatch.undo()
    with pytest.raises(ModelError, match="format_version"):
        load_record(Path(old.folder) / "stats.json", Stats)
    new = collect_stats(model, texts, tmp_path, max_tokens=512)
    assert new.folder != old.folder and load_record(Path(new.folder) / "stats.json", Stats).key == new.key


def test_probes_cost_more_with_fewer_bits_and_fewer_experts(stats: Stats) -> None:
    whole = {p.bits: np.mean(p.kl) for p in stats.probes if p.kind == "all"}
    assert whole[4] > 4 * whole[6] > 0
    for layer in (0, 1):
        drops = sorted((len(p.kept), float(np.mean(p.kl))) for p in stats.probes if p.kind == "drop" and p.layer == layer)
        assert [kl for _, kl in drops] == sorted((kl for _, kl in drops), reverse=True)
