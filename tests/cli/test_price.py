"""`edgemoe price` with an imatrix: what it wants, and what its plan is worth in llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import MODEL
from imatrix_file import OTHER, REAL
from tiny import flat_plan

from edgemoe.base.storage import load_record
from edgemoe.cli.main import main
from edgemoe.ir import Plan, Stats
from edgemoe.ir.memory import peak
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.emit import emit_artifact
from edgemoe.stream.texts import choose_texts
from edgemoe.targets import find_target
from edgemoe.verify.logits import compare_logits, reference_states, tokenize_heldout

TARGET = find_target("gguf")


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
