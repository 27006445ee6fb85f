"""The examples run as they are printed, on the bundled model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import TOKENS

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.usefixtures("gguf_costs")  # lie in `work`


def run_example(name: str, work: Path, *arguments: str) -> str:
    command = [sys.executable, EXAMPLES / f"{name}.py", "--work", work, "--calibration-tokens", str(TOKENS), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=work, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_custom_constraint_holds_and_is_reported(work: Path) -> None:
    out = run_example("custom_constraint", work)
    assert "with rules" in out and "light_traffic" in out and "gate and up alike" in out


def test_the_sweep_gets_better_with_memory_and_writes_its_page(work: Path) -> None:
    out = run_example("sweep", work, "-o", str(work / "sweep"))
    kl = [float(line.rpartition("KL ")[2]) for line in out.splitlines() if "KL " in line]
    assert len(kl) >= 5 and kl == sorted(kl, reverse=True)
    assert "<canvas" in (work / "sweep" / "sweep.html").read_text() and (work / "sweep" / "sweep.csv").stat().st_size > 200


def test_the_split_between_gpu_and_ram_prints_flags_for_llama_cpp(work: Path) -> None:
    out = run_example("vram_split", work, "--vram", "11.5MB", "--memory", "35MB")
    assert "-ngl 999" in out and "=CPU" in out
