"""Prices from an imatrix file and a table of scores: tables that are wrong, and what the plans are worth."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from imatrix_file import entries_of, write
from tiny import make_checkpoint

from edgemoe.base.errors import ModelError
from edgemoe.calibrate.imatrix import read_imatrix, save_imported_stats
from edgemoe.ir import Costs, Model, Stats
from edgemoe.model.inspect import inspect_model
from edgemoe.plan.solve import solve_plan
from edgemoe.price.choices import price_choices
from edgemoe.price.imported import MAX_CSV, price_imported, read_saliency
from edgemoe.price.priors import Saliency, price_generic
from edgemoe.rules import MaxFormats
from edgemoe.targets import find_target

TARGET = find_target("gguf")


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
