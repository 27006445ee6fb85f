"""onnxruntime-genai runs what we write, and says what plain onnxruntime says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from onnx_folder import greedy, write_folder
from tiny import EXAMPLES, make_checkpoint

from edgemoe.ir import Unit

sys.path.insert(0, str(EXAMPLES))
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("onnxruntime_genai"), reason="pip install onnxruntime-genai")
IDS = [1163, 957, 632, 71, 414]  # "The little dog was"


def mixed(unit: Unit) -> str:
    """Every width there is: experts by their number, the rest at 8 bits and 4."""
    if unit.expert >= 0:
        return ("INT4_32", "INT2_64", "INT3_32", "INT8_32")[unit.expert % 4]
    return "INT4_32" if unit.role in ("attn_output", "token_embd") else "INT8_64"


@pytest.mark.parametrize("target", ["onnx", "browser"])
def test_genai_reads_text_and_says_what_plain_onnxruntime_says(target: str, tmp_path: Path) -> None:
    _, artifact = write_folder(EXAMPLES / "tiny-moe", tmp_path / "out", "INT4_32", target=target)
    expected = greedy(artifact.path, IDS, 24)
    command = [sys.executable, EXAMPLES / "onnx_genai.py", tmp_path / "out", "The little dog was", "--tokens", "24", "--greedy"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(EXAMPLES / "tiny-moe" / "tokenizer.json")).decode([*IDS, *expected])
    assert said.splitlines()[:-1] == text.splitlines()
    assert said.splitlines()[-1].startswith("24 tokens in ")


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_genai_runs_other_families_with_every_width_and_ragged_layers(family: str, tmp_path: Path) -> None:
    from onnx_genai import generate

    source = make_checkpoint(tmp_path / "model", family)
    _, artifact = write_folder(source, tmp_path / "out", mixed, kept=[[0, 1, 2, 3, 5, 6, 7], [1, 3, 4]])
    assert generate(str(tmp_path / "out"), IDS, 24, greedy=True) == greedy(artifact.path, IDS, 24, ends=[0])


def test_genai_ends_at_any_end_of_text(tmp_path: Path) -> None:
    from onnx_genai import generate

    _, artifact = write_folder(EXAMPLES / "tiny-moe", tmp_path / "out", "INT4_32")
    said = greedy(artifact.path, IDS, 12)
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = [0, said[7]]
    (tmp_path / "out" / "genai_config.json").write_text(json.dumps(config))
    assert generate(str(tmp_path / "out"), IDS, 12, greedy=True) == greedy(artifact.path, IDS, 12, ends=[said[7]])
