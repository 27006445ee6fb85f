"""Every architecture with experts that llama.cpp runs, built from a tiny random GGUF at two budgets: formats alone, and with drops."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from architectures import ARCHITECTURES, N_CTX, N_EXPERTS, QUICK, make_all

from edgemoe.base.errors import EdgemoeError, ModelError
from edgemoe.pipeline.build import build_artifact, open_model
from edgemoe.pipeline.request import BuildRequest
from edgemoe.price import experts, matrices
from edgemoe.price.choices import least_process
from edgemoe.rules.records import KeptCount
from edgemoe.targets import find_target

REFUSED = {
    "hy_v4": "hand on several values",
    "kimi-k3": "hand on several values",
    "qwen4exp": "hand on several values",
    "llama4": "multiplied into the inputs",
}
WHOLE = ("grovemoe",)  # no expert can go
FED_BACK = ("nemotron_h_moe", "deepseek2", "qwen3next")
KEPT, TOKENS = 6, 512
WORDS = ("rain", "spain", "stays", "mainly", "on", "the", "plain", "nobody", "told", "them", "that", "hard", "heart", "turn", "tide")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("architectures")
    yield make_all(folder)
    shutil.rmtree(folder)  # 1.3 GB


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """One core for each worker: llama.cpp's threads wait for each other by spinning, and two workers would spin against each other."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not worker or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    rng, folder = random.Random(1), tmp_path_factory.mktemp("texts")
    paths = folder / "calibration.txt", folder / "heldout.txt"
    for path, paragraphs in zip(paths, (20, 6), strict=True):
        path.write_text("\n\n".join(" ".join(rng.choice(WORDS) for _ in range(30)) for _ in range(paragraphs)))
    return paths


BUILT = [a if a in QUICK[1:3] else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES if a not in REFUSED]


@pytest.mark.parametrize("architecture", BUILT)
def test_it_is_built_from_a_gguf_with_formats_alone_and_with_fewer_experts(
    architecture: str, files: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build fails by itself if the file does not load, KL is no small one, or the peak is over the budget."""
    for module in (experts, matrices):
        monkeypatch.setattr(module, "SAMPLE_WEIGHTS", 2**12)
    model = open_model(str(files[architecture]))
    least = least_process(model, find_target("gguf"), N_CTX)
    for share, kept in ((0.42, N_EXPERTS), (0.12, KEPT)):
        if kept < N_EXPERTS and architecture in WHOLE:
            assert model.router.scoring == "unknown"
            continue
        budget = least + int(share * model.n_bytes)
        request = BuildRequest(
            model=str(files[architecture]),
            memory=budget,
            out=tmp_path / f"out{kept}",
            context=N_CTX,
            calibration=(str(texts[0]),),
            heldout=(str(texts[1]),),
            calibration_tokens=TOKENS,
            rounding="feedback" if architecture in FED_BACK else "stock",  # feedback takes minutes for all of them
            rules=(KeptCount(at_least=kept, at_most=kept),),
            work=tmp_path / "work",
        )
        report = build_artifact(request)
        assert report.plan.count == kept
        assert report.artifact.model_size == report.plan.file_size
        assert report.measured_peak <= budget


@pytest.mark.parametrize("architecture", REFUSED)
def test_it_is_refused_by_name_and_reason(architecture: str, files: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=REFUSED[architecture]) as refused:
        open_model(str(files[architecture]))
    assert isinstance(refused.value, EdgemoeError)
    assert architecture in str(refused.value)


def test_at_least_fifty_architectures_are_built() -> None:
    assert len(set(ARCHITECTURES) - set(REFUSED) - set(WHOLE)) >= 50
