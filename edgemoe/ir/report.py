"""This module defines the Artifact record of written files, and the Report record of their measurements."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemoe.ir.check_records import check_artifact, check_report
from edgemoe.ir.plan import Plan

MODEL_FILES = (".gguf", ".onnx", ".onnx.data", ".onnx_data", ".safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFile:
    """One file of an artifact, named relative to the output folder."""

    name: str
    size: int
    sha256: str

    @property
    def holds_model(self) -> bool:
        """Whether this file is a part of the model, which a plan's file_size counts."""
        return self.name.endswith(MODEL_FILES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """The written files, of which the first is the one to load."""

    folder: str
    target: str
    plan: str
    files: tuple[ArtifactFile, ...]

    def __post_init__(self) -> None:
        check_artifact(self)

    @property
    def path(self) -> Path:
        """The file to load."""
        return Path(self.folder) / self.files[0].name

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)

    @property
    def model_size(self) -> int:
        """Bytes of the files that hold the model, which a plan's file_size promises; small files beside them are not counted."""
        return sum(f.size for f in self.files if f.holds_model)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScore:
    """The artifact compared with the original on one held-out text; KL is in nats per token, and perplexities are per token."""

    name: str
    tokens: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    perplexity: float
    original_perplexity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round of refinement: the KL of a plan and of its drops alone, predicted by prices and expected after a measurement.

    KL is in nats per token.  `expected` is the KL on unseen text, after a measurement on calibration text (`expect` in pipeline/refine.py).
    The factors are those by which prices of drops and of formats were then multiplied.
    """

    predicted: float
    expected: float
    predicted_drops: float
    expected_drops: float
    count: int
    file_size: int
    drop_factor: float
    format_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The promised and the measured figures, and everything else that the report page shows."""

    model: dict[str, Any]
    plan: Plan
    artifact: Artifact
    scores: tuple[TextScore, ...]
    measured_kl: float
    measured_peak: int
    beside_kl: float  # under the target's other settings (Target.runs), from a few windows
    prompt_tokens_per_second: float
    decode_tokens_per_second: float
    decode_ceiling: float  # tokens per second that this machine's measured bandwidth would allow: an estimate, from bytes read per token
    samples: tuple[dict[str, Any], ...]
    frontier: tuple[dict[str, float], ...]  # predicted KL of the best plan at other sizes
    problems: tuple[str, ...]
    runtime: str
    machine: str
    rounds: tuple[Round, ...] = ()  # the rounds of refinement that led to the plan

    def __post_init__(self) -> None:
        check_report(self)
