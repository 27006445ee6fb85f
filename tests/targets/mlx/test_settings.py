"""The float type of an MLX folder follows the activations that calibration saw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command import error_of, run_cli
from tiny import EXAMPLES, flat_stats

from edgemoe.base.errors import UsageError
from edgemoe.base.storage import array_file, load_arrays, save_arrays
from edgemoe.cli.options import target_options
from edgemoe.ir import Model, Stats
from edgemoe.model.inspect import inspect_model
from edgemoe.targets import find_target
from edgemoe.targets.mlx.settings import largest_activation


def stats_with(model: Model, folder: Path, largest: float | None) -> Stats:
    """Statistics in which the last layer saw such an activation, and all others smaller ones."""
    stats = flat_stats(model, folder)
    for layer in range(model.n_layers):
        path = folder / array_file(layer)
        told = {} if largest is None else {"largest": np.array([largest if layer == model.n_layers - 1 else 1.0])}
        save_arrays(path, {**load_arrays(path), **told})
    return stats


@pytest.mark.parametrize(("largest", "dtype"), [(3.0, "f16"), (8188.0, "f16"), (8189.0, "bf16"), (1e9, "bf16"), (None, "bf16")])
def test_float16_is_for_activations_far_below_its_end(sources: dict[str, Path], tmp_path: Path, largest: float | None, dtype: str) -> None:
    model = inspect_model(sources["olmoe"])
    stats, target = stats_with(model, tmp_path / "stats", largest), find_target("mlx-kv8")
    assert target.settle is not None
    assert target.settle(model, stats).name == f"mlx-{dtype}-kv8"


def test_float16_is_refused_where_it_was_asked_for_and_activations_are_large(sources: dict[str, Path], tmp_path: Path) -> None:
    model = inspect_model(sources["olmoe"])
    settle = find_target("mlx-f16").settle
    assert settle is not None
    with pytest.raises(UsageError, match=r"--dtype f16: the largest activation on the calibration text is 70000"):
        settle(model, stats_with(model, tmp_path / "stats", 70000.0))
    settle = find_target("mlx-bf16").settle
    assert settle is not None
    assert settle(model, stats_with(model, tmp_path / "stats2", 70000.0)).name == "mlx-bf16"


def test_calibration_records_the_largest_activation(shipped_stats: Stats) -> None:
    from command import MODEL

    model = inspect_model(MODEL)
    largest = largest_activation(model, shipped_stats)
    states = [float(shipped_stats.arrays(layer)["replay_stream"].max()) for layer in range(model.n_layers)]
    inputs = [float(np.abs(shipped_stats.arrays(layer)["replay_x"]).max()) for layer in range(model.n_layers)]
    assert max(inputs) <= largest * 1.01  # replay tokens are some of those that were seen, in bfloat16
    assert largest**2 >= max(states) / model.hidden_size  # no less than the root mean square of a state
    assert largest < 1000


@pytest.mark.parametrize("options", [("--dtype", "bf16"), ("--kv-bits", "8"), ("--max-kv-size", "512")])
def test_options_of_mlx_go_with_no_other_target(tmp_path: Path, options: tuple[str, str]) -> None:
    refused = run_cli("build", tmp_path, "--memory", "1GB", *options, "-o", tmp_path / "out", "--dry-run")
    assert refused.returncode == 2
    assert f"{options[0]} goes with --target mlx, not gguf" in error_of(refused.stderr)


def test_an_unknown_type_is_refused_by_its_option(tmp_path: Path) -> None:
    refused = run_cli("build", tmp_path, "--memory", "1GB", "--target", "mlx", "--dtype", "f32", "-o", tmp_path / "out", "--dry-run")
    assert refused.returncode == 2
    assert "--dtype f32 is not known" in error_of(refused.stderr)


@pytest.mark.parametrize(("option", "value", "what"), [("--kv-bits", -1, "bits"), ("--max-kv-size", 0, "tokens")])
def test_a_number_that_is_none_is_refused_by_its_option(option: str, value: int, what: str) -> None:
    refused = run_cli("plan", "--generic", "olmoe-1b-7b", "--target", "mlx", option, value, "--memory", "9GB")
    assert refused.returncode == 2
    assert f"{option} {value} is not a number of {what}" in error_of(refused.stderr)


def test_a_target_with_settings_is_told_by_its_options() -> None:
    assert target_options("gguf") == ["--target", "gguf"]
    assert target_options("mlx-bf16-kv8") == ["--target", "mlx", "--dtype", "bf16", "--kv-bits", "8"]
    assert target_options("mlx-max4096") == ["--target", "mlx", "--max-kv-size", "4096"]


def test_a_plan_without_weights_takes_the_settings_of_the_cache() -> None:
    def kv(*options: object) -> int:
        done = run_cli(
            "plan", "--generic", "qwen3-30b-a3b", "--target", "mlx", "--memory", "40GB", "--solver", "lagrange", "--json", *options
        )
        assert done.returncode == 0, done.stderr
        return int(json.loads(done.stdout)["memory"]["kv"])

    assert kv("--kv-bits", 4, "--dtype", "bf16") == kv() * 9 // 32


def test_prices_from_an_imatrix_know_no_activation_and_take_bfloat16(tmp_path: Path) -> None:
    source = EXAMPLES / "tiny-moe-b"
    done = run_cli("price", source, "--imatrix", source / "imatrix.gguf", "--target", "mlx", "-o", tmp_path / "costs.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "costs.json").read_text())["target"] == "mlx-bf16"
