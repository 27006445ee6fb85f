"""Repair of a trained model: what changes, what does not, and that held-out text says it was worth it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import EXAMPLES, flat_plan

from edgemoe.base.errors import ModelError
from edgemoe.base.storage import array_file, load_sealed, save_sealed
from edgemoe.ir import Model, Plan
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.inspect import inspect_model
from edgemoe.repair.survivors import repair_survivors
from edgemoe.stream.adapter import only_experts
from edgemoe.stream.layers import LayerStream, apply_norm
from edgemoe.stream.texts import SHIPPED, Text, read_text
from edgemoe.stream.windows import tokenize

TOKENS = 16_384
EVEN = tuple(range(0, 16, 2))


@pytest.fixture(scope="module")
def model() -> Model:
    return inspect_model(EXAMPLES / "tiny-moe")


@pytest.fixture(scope="module")
def plan(model: Model) -> Plan:
    return flat_plan(model, kept=[EVEN] * model.n_layers)


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return [read_text(str(path)) for path in sorted((SHIPPED / "calibration").glob("*.txt"))]


@pytest.fixture(scope="module")
def repaired(model: Model, plan: Plan, texts: list[Text], tmp_path_factory: pytest.TempPathFactory) -> Model:
    return repair_survivors(model, texts, plan, tmp_path_factory.mktemp("repair"), max_tokens=TOKENS, epochs=1)


@pytest.fixture(scope="module")
def small(texts: list[Text]) -> tuple[Model, list[Text], Plan]:
    """Something quick to repair."""
    model = inspect_model(EXAMPLES / "tiny-moe-b")
    return model, texts, flat_plan(model, kept=[(0, 1, 4), (2, 3, 6)])


def heldout_kl(original: Model, model: Model, plan: Plan) -> np.ndarray:
    """KL of the pruned model on each held-out text, by transformers' modules."""
    texts = [read_text(str(path)) for path in sorted((SHIPPED / "heldout").glob("*.txt"))]
    windows = tokenize(original, texts, 5 * 512, 512)

    def logits(which: Model, experts: tuple[int, ...]) -> torch.Tensor:
        stream = LayerStream(which)
        states = stream.embed(windows.tokens)
        for layer in range(which.n_layers):
            module = stream.load_layer(layer)
            with only_experts(module, np.array(experts)):
                states = stream.run_layer(module, states)
        norm, head, eps = stream.head()
        return (apply_norm(states, norm, eps) @ head.T).double().log_softmax(-1)

    p, q = logits(original, tuple(range(original.n_experts))), logits(model, plan.kept[0])
    return (p.exp() * (p - q)).sum(-1).mean(1).cpu().numpy()


def test_dropping_half_costs_much_less_after_repair_on_every_heldout_text(model: Model, repaired: Model, plan: Plan) -> None:
    before, after = heldout_kl(model, model, plan), heldout_kl(model, repaired, plan)
    assert after.mean() < 0.75 * before.mean()
    assert (after < before).all()


def test_only_the_survivors_change(model: Model, repaired: Model) -> None:
    assert replace(repaired, tensors=()) == replace(model, tensors=())
    for old, new in zip(model.tensors, repaired.tensors, strict=True):
        if old.expert not in EVEN:
            assert new == old
        else:
            assert (new.name, new.role, new.layer, new.expert, new.shape, new.dtype) == (
                *(old.name, old.role, old.layer, old.expert),
                *(old.shape, old.dtype),
            )
    changed = [t for t in repaired.tensors if t.layer == 2 and t.expert in EVEN and t.role == "ffn_down_exps"]
    assert any(not np.array_equal(read_tensor(repaired.folder, t), read_tensor(model.folder, _same(model, t))) for t in changed)


def _same(model: Model, tensor: object) -> object:
    return model.find(tensor.role, tensor.layer, tensor.expert)  # type: ignore[attr-defined]


def folder_of(model: Model) -> Path:
    return next(Path(t.file).parent for t in model.tensors if Path(t.file).is_absolute())


def test_a_finished_repair_is_opened_and_leaves_no_scratch(model: Model, repaired: Model, plan: Plan, texts: list[Text]) -> None:
    folder = folder_of(repaired)
    assert not list(folder.glob("*.bin"))
    assert repair_survivors(model, texts, plan, folder.parent, max_tokens=TOKENS, epochs=1) == repaired


def test_a_killed_repair_goes_on_and_gives_the_same_bytes(small: tuple[Model, list[Text], Plan], tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 1:
            raise Killed

    seen: list[int] = []
    whole = repair_survivors(*small, tmp_path / "whole", max_tokens=4096, epochs=1)
    with pytest.raises(Killed):
        repair_survivors(*small, tmp_path / "killed", max_tokens=4096, epochs=1, progress=kill)
    resumed = repair_survivors(*small, tmp_path / "killed", max_tokens=4096, epochs=1, progress=lambda done, total: seen.append(done))
    assert seen == [1, 2]
    for layer in (0, 1):
        assert (folder_of(whole) / array_file(layer)).read_bytes() == (folder_of(resumed) / array_file(layer)).read_bytes()


def test_a_stale_repair_is_made_anew(small: tuple[Model, list[Text], Plan], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = repair_survivors(*small, tmp_path, max_tokens=4096, epochs=1)
    record = folder_of(first) / "model.json"
    save_sealed(record, {**load_sealed(record), "fingerprint": "f" * 64})
    assert repair_survivors(*small, tmp_path, max_tokens=4096, epochs=1) == first
    assert "another checkpoint" in caplog.text and "made anew" in caplog.text


def test_other_texts_or_kept_sets_make_another_repair(small: tuple[Model, list[Text], Plan], tmp_path: Path) -> None:
    model, texts, plan = small
    other = flat_plan(model, kept=[(0, 1, 2)] * 2)
    made = [
        repair_survivors(model, some, p, tmp_path, max_tokens=2048, epochs=0)
        for some, p in ((texts, plan), (texts[:1], plan), (texts, other))
    ]
    assert len({folder_of(m).name for m in made}) == 3
    with pytest.raises(ModelError, match="another checkpoint"):
        repair_survivors(model, texts, replace(plan, model="f" * 64), tmp_path)


def test_without_drops_there_is_nothing_to_repair(model: Model, texts: list[Text], tmp_path: Path) -> None:
    assert repair_survivors(model, texts, flat_plan(model), tmp_path / "none") is model
    assert not (tmp_path / "none").exists()
