"""This module runs an artifact on held-out text in its real runtime, compares it with the original, and returns a Report.

The original's last hidden states come from the layer stream, so the model may be larger than memory.  Logits of both sides are compared
one window at a time and never kept.  KL is measured under the settings for which the target predicts, and once more under others
(`Target.runs`).  llama.cpp runs first with the weights' error alone, and then as deployed; onnxruntime runs first as deployed, and then
with float experts.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgemoe.base.errors import VerifyError
from edgemoe.base.progress import Progress
from edgemoe.base.storage import hash_file
from edgemoe.base.types import F32
from edgemoe.base.units import format_bytes
from edgemoe.devices.detect import measure_bandwidth
from edgemoe.devices.profiles import estimate_speed
from edgemoe.ir import Artifact, Model, Plan, Report
from edgemoe.model.licence import read_card, read_gguf_card
from edgemoe.stream.texts import Text
from edgemoe.targets import Target
from edgemoe.verify.decoded import NOTE, NOTHING, decoding_target, must_decode
from edgemoe.verify.logits import compare_logits, reference_states, tokenize_heldout

DEFAULT_TOKENS = 16_384
BESIDE_WINDOWS = 4  # windows of the second figure
TOKENIZER_LINES = 200
GENERATE = 64
LOOP_SHARE = 0.5  # share of repeated 4-grams above which a continuation counts as a loop
KL_SURPRISE = 3.0  # if measured KL is this many times the prediction, the report says so
KL_NOTED = 1e-3  # nats; a smaller KL is never a surprise
KL_BROKEN = 0.05  # nats; a surprise above it is a broken promise, below it a note


def verify_artifact(
    artifact: Artifact,
    model: Model,
    plan: Plan,
    heldout: Sequence[Text],
    target: Target,
    work: Path,
    *,
    max_tokens: int = DEFAULT_TOKENS,
    progress: Progress | None = None,
) -> Report:
    """Run the artifact and measure everything that the report shows.

    Args:
        artifact: from `emit_artifact`.
        model: the original.
        plan: with the promised figures.
        heldout: text that calibration has not seen.
        target: that runs the artifact.
        work: folder where the original's hidden states are kept for the next verification.
        max_tokens: held-out tokens of all texts together.
        progress: called with (windows done, all windows).

    Raises:
        VerifyError: a file of the artifact is not what was written, or the artifact does not load or run.
    """
    check_files(artifact)
    windows = tokenize_heldout(model, heldout, max_tokens)
    states = reference_states(model, windows, work)
    decoded = must_decode(target)
    if decoded:
        target, measured, notes = decoding_target(target, artifact, model, plan, work), dict(NOTHING), [NOTE.format(target=target.name)]
    else:
        measured, notes = _measure(target, artifact, _measure_job(plan, heldout, windows))
    names = [t.name for t in heldout]
    texts = compare_logits(artifact.path, model, windows, states, names, target, progress=progress)
    mean_kl = float(np.mean([t.kl_mean for t in texts]))
    settings = {**target.runs.beside, **((target.runs.fallback or {}) if notes else {})}
    beside = 0.0 if decoded else mean_kl * _ratio_beside(artifact.path, model, windows, states, target, settings)
    notes = [*_note_beside(target, mean_kl, beside), *notes]
    samples = tuple({**s, "loops": repeats(s["tokens"])} for s in measured["samples"])
    return Report(
        model=_describe(model),
        plan=plan,
        artifact=artifact,
        scores=texts,
        measured_kl=mean_kl,
        measured_peak=int(measured["peak"]),
        beside_kl=beside,
        prompt_tokens_per_second=measured["prompt_tokens_per_second"],
        decode_tokens_per_second=measured["decode_tokens_per_second"],
        decode_ceiling=0.0 if decoded else estimate_speed(plan.active_bytes, plan.memory["kv"], measure_bandwidth()),
        samples=samples,
        frontier=(),
        problems=(*_find_problems(artifact, model, plan, heldout, target, int(measured["peak"]), mean_kl), *notes),
        runtime="edgemoe's own decoding" if decoded else target.runtime(),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    )


def check_files(artifact: Artifact) -> None:
    """Compare every file of an artifact with the size and the SHA-256 that were recorded when it was written.

    Raises:
        VerifyError: names the first file that is missing or another.
    """
    for file in artifact.files:
        path = Path(artifact.folder) / file.name
        if not path.is_file():
            raise VerifyError(f"{path}: is missing", hint="build or emit it again")
        if path.stat().st_size != file.size or hash_file(path) != file.sha256:
            raise VerifyError(f"{path}: was changed or damaged after edgemoe wrote it", hint="build or emit it again")


def _ratio_beside(path: Path, model: Model, windows: Any, states: F32, target: Target, settings: Mapping[str, bool]) -> float:
    """KL under the other settings divided by KL under the prediction's settings, on the same few windows."""
    some = np.unique(np.linspace(0, len(windows.tokens) - 1, BESIDE_WINDOWS).round().astype(int))
    few, names = windows.take(some), [str(number) for number in range(int(windows.domain.max()) + 1)]
    found = [compare_logits(path, model, few, states[some], names, target, settings=each) for each in (settings, None)]
    other, own = (float(np.average([t.kl_mean for t in texts], weights=[t.tokens for t in texts])) for texts in found)
    return other / own if own > 0 else 1.0


def _measure(target: Target, artifact: Artifact, job: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Run the artifact as a user would; if the runtime fails on this machine, use the target's fallback settings and return a note."""
    try:
        return target.run(artifact.path, job, None), []
    except VerifyError as error:
        if target.runs.fallback is None:
            raise
        measured = target.run(artifact.path, {**job, **target.runs.fallback}, None)
        return measured, [f"note: {target.runs.fallback_note.format(error=error)}"]


def _measure_job(plan: Plan, heldout: Sequence[Text], windows: Any) -> dict[str, Any]:
    """A full context of held-out text, and the first words of each text to go on from."""
    prompts = [" ".join("".join(text.documents)[:400].split()[:12]) for text in heldout]
    tokens = [int(t) for w, n in zip(windows.tokens, windows.lengths, strict=True) for t in w[:n]]
    return {"context": plan.context, "tokens": tokens, "prompts": prompts, "generate": GENERATE}


def repeats(tokens: Sequence[int], n: int = 4) -> bool:
    """Whether a continuation is a loop, that is whether more than half of its n-grams occurred before."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return bool(grams) and 1 - len(set(grams)) / len(grams) > LOOP_SHARE


def _find_problems(
    artifact: Artifact, model: Model, plan: Plan, heldout: Sequence[Text], target: Target, peak: int, kl: float
) -> list[str]:
    """The problems for the report: broken promises first, then surprises."""
    problems = []
    if peak > plan.budget:
        problems.append(f"peak memory {format_bytes(peak)} is over the budget of {format_bytes(plan.budget)}")
    lines = [line for text in heldout for line in "".join(text.documents).splitlines() if line.strip()]
    step = max(1, len(lines) // TOKENIZER_LINES)
    wrong = target.check_tokenizer(artifact.path, model, lines[::step][:TOKENIZER_LINES])
    if wrong:
        problems.append(f"{len(wrong)} lines are tokenized otherwise than by the original, the first: {wrong[0][:80]!r}")
    if kl > KL_SURPRISE * plan.predicted_kl and kl > KL_NOTED:
        surprise = f"measured KL {kl:.4f} is more than {KL_SURPRISE:g} times the prediction {plan.predicted_kl:.4f}"
        problems.append(surprise if kl > KL_BROKEN else f"note: {surprise}")
    return problems


def _note_beside(target: Target, kl: float, beside: float) -> list[str]:
    """A note if the runtime's own settings, as a quantized KV cache, cost far more than the weights, which alone are predicted."""
    if beside <= KL_SURPRISE * max(kl, KL_NOTED):
        return []
    return [f"note: with {target.words.beside}, KL is {beside:.4f}; the weights alone have {kl:.1e}"]


def broken_promises(report: Report) -> list[str]:
    """The problems that make a build fail; notes do not."""
    return [p for p in report.problems if not p.startswith("note:")]


def _describe(model: Model) -> dict[str, Any]:
    keys = ("name", "model_type", "n_layers", "n_experts", "top_k", "hidden_size", "n_weights", "n_bytes")
    card = read_gguf_card(model.config) if model.architecture else read_card(Path(model.folder))
    return {**{k: getattr(model, k) for k in keys}, **card}
