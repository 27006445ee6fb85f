"""This module stands in for a runtime that is not installed: an artifact's bytes are decoded, and our own stream computes the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgemoe.base.types import F32
from edgemoe.ir import Artifact, Model, Plan
from edgemoe.model.checkpoint import read_tensor
from edgemoe.stream.passes import final_states
from edgemoe.stream.windows import Windows
from edgemoe.targets import MISSING, Target

NOTE = "note: {target}'s runtime is not installed here, so nothing was run: KL is that of what the bytes decode to"
NOTHING: Mapping[str, Any] = {"peak": 0, "prompt_tokens_per_second": 0.0, "decode_tokens_per_second": 0.0, "samples": ()}


def must_decode(target: Target) -> bool:
    """Whether an artifact can only be decoded here."""
    return target.decode is not None and target.runtime() == MISSING


def decoding_target(target: Target, artifact: Artifact, model: Model, plan: Plan, work: Path) -> Target:
    """The target with a `run` that gives the logits of the decoded weights; other jobs than "windows" give nothing."""
    assert target.decode is not None
    decoded = target.decode(Path(artifact.folder), model, plan, work / "decoded")
    head = read_tensor(decoded.folder, decoded.output_matrix)

    def run(path: Path, job: Mapping[str, Any], on_logits: Callable[[int, F32], None] | None) -> dict[str, Any]:
        rows = job.get("windows", ())
        if rows and on_logits:
            lengths = np.array([len(row) for row in rows])
            tokens = np.array([[*row, *[0] * (lengths.max() - len(row))] for row in rows])
            states = final_states(decoded, Windows(tokens=tokens, lengths=lengths, domain=np.zeros(len(rows), int)), work, kept=plan.kept)
            for number, length in enumerate(lengths):
                on_logits(number, states[number, :length] @ head.T)
        return dict(NOTHING)

    return replace(target, run=run)
