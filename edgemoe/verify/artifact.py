"""Artifact, Model, held-out text -> Report: run the file in the real runtime and compare it with the original.

The original's last hidden states come from the layer stream (so it may be larger than memory); logits of both sides are compared a window
at a time and never kept.  KL is measured under the settings that the target's predictions are for, and once more under others
(`Target.RUNS`): llama.cpp first so that the error is the weights' alone, then as deployed; onnxruntime as it runs, then with float experts.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import VerifyError
from edgemoe.base.storage import alone, hash_json, load_arrays, save_arrays
from edgemoe.base.units import format_bytes
from edgemoe.devices.detect import measure_bandwidth
from edgemoe.devices.profiles import estimate_speed
from edgemoe.ir import Artifact, Model, Plan, Report, TextScore
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.families import resize_experts
from edgemoe.stream.texts import Text
from edgemoe.targets import Target

WINDOW = 512
DEFAULT_TOKENS = 16_384
BESIDE_WINDOWS = 4  # of the second figure
TOKENIZER_LINES = 200
GENERATE = 64
ROWS_AT_ONCE = 64  # of logits in float64
LOOP_SHARE = 0.5  # of repeated 4-grams above which a continuation counts as a loop
KL_SURPRISE = 3.0  # times the prediction: worth a line in the report


@dataclass
class _Scores:
    """Per-token figures of one text, filled window by window."""

    kl: list[NDArray[np.float64]] = field(default_factory=list)
    same: list[NDArray[np.bool_]] = field(default_factory=list)
    nll: list[NDArray[np.float64]] = field(default_factory=list)
    original_nll: list[NDArray[np.float64]] = field(default_factory=list)


def verify_artifact(
    artifact: Artifact,
    model: Model,
    plan: Plan,
    heldout: Sequence[Text],
    target: Target,
    work: Path,
    *,
    max_tokens: int = DEFAULT_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Run the artifact and measure everything that the report shows.

    Args:
        artifact: from `emit_artifact`.
        model: the original.
        plan: what was promised.
        heldout: text that calibration has not seen.
        target: who runs it.
        work: folder where the original's hidden states are kept for the next verification.
        max_tokens: held-out tokens of all texts together.
        progress: called with (windows done, all windows).

    Raises:
        VerifyError: the artifact does not load or run.
    """
    windows = tokenize_heldout(model, heldout, max_tokens)
    states = reference_states(model, windows, work)
    measured, notes = _measure(target, artifact, _measure_job(plan, heldout, windows))
    names = [t.name for t in heldout]
    texts = compare_logits(artifact.path, model, windows, states, names, target, progress=progress)
    mean_kl = float(np.mean([t.kl_mean for t in texts]))
    settings = {**target.RUNS.beside, **((target.RUNS.fallback or {}) if notes else {})}
    samples = tuple({**s, "loops": repeats(s["tokens"])} for s in measured["samples"])
    return Report(
        model=_describe(model),
        plan=plan,
        artifact=artifact,
        units=tuple(u for u in target.list_units(resize_experts(model, plan.width or model.expert_size)) if u.name in plan.formats),
        scores=texts,
        measured_kl=mean_kl,
        measured_peak=int(measured["peak"]),
        beside_kl=mean_kl * _ratio_beside(artifact.path, model, windows, states, target, settings),
        prompt_tokens_per_second=measured["prompt_tokens_per_second"],
        decode_tokens_per_second=measured["decode_tokens_per_second"],
        decode_ceiling=estimate_speed(plan.active_bytes, plan.memory["kv"], measure_bandwidth()),
        samples=samples,
        frontier=(),
        problems=(*_find_problems(artifact, model, plan, heldout, target, int(measured["peak"]), mean_kl), *notes),
        runtime=target.runtime(),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    )


def compare_logits(
    path: Path,
    model: Model,
    windows: Any,
    states: NDArray[np.float32],
    names: Sequence[str],
    target: Target,
    *,
    settings: Mapping[str, bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TextScore, ...]:
    """KL, perplexity and agreement of a file on windows whose original last states [windows, length, hidden] are known, by text.

    `settings` of the run: those that predictions are for, if they are not given.

    Raises:
        VerifyError: it does not run, or gives NaN.
    """
    scores = [_Scores() for _ in names]
    head = read_tensor(model.folder, model.find("output") or model.find("token_embd"))  # type: ignore[arg-type]
    rows = [w[:n].tolist() for w, n in zip(windows.tokens, windows.lengths, strict=True)]

    def compare(number: int, logits: NDArray[np.float32]) -> None:
        tokens = np.array(rows[number])
        _score_window(states[number, : len(tokens)] @ head.T, logits, tokens, scores[int(windows.domain[number])])
        if progress:
            progress(number + 1, len(rows))

    if progress:
        progress(0, len(rows))
    target.run(path, {"windows": rows, "vocab_size": model.vocab_size, **(settings or target.RUNS.compared)}, compare)
    return tuple(_text_score(name, s) for name, s in zip(names, scores, strict=True) if s.kl)


def _ratio_beside(
    path: Path, model: Model, windows: Any, states: NDArray[np.float32], target: Target, settings: Mapping[str, bool]
) -> float:
    """KL under other settings over that under those of the prediction, on the same few windows: what differs is the settings alone."""
    some = np.unique(np.linspace(0, len(windows.tokens) - 1, BESIDE_WINDOWS).round().astype(int))
    few, names = windows.take(some), [str(number) for number in range(int(windows.domain.max()) + 1)]
    found = [compare_logits(path, model, few, states[some], names, target, settings=each) for each in (settings, None)]
    other, own = (float(np.average([t.kl_mean for t in texts], weights=[t.tokens for t in texts])) for texts in found)
    return other / own if own > 0 else 1.0


def _measure(target: Target, artifact: Artifact, job: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Run as a user would; where the runtime fails so on this machine, and the target has a way out, that way and with a note."""
    try:
        return target.run(artifact.path, job, None), []
    except VerifyError as error:
        if target.RUNS.fallback is None:
            raise
        measured = target.run(artifact.path, {**job, **target.RUNS.fallback}, None)
        return measured, [f"note: {target.RUNS.fallback_note.format(error=error)}"]


def tokenize_heldout(model: Model, heldout: Sequence[Text], max_tokens: int) -> Any:
    """Held-out windows, every position of which is compared."""
    from edgemoe.stream.layers import tokenize

    return tokenize(model, heldout, max_tokens, WINDOW)


def reference_states(model: Model, windows: Any, work: Path) -> NDArray[np.float32]:
    """Last hidden states of the original on these windows, kept in `work` for the next budget."""
    from edgemoe.stream.layers import final_states

    work.mkdir(parents=True, exist_ok=True)
    key = hash_json(model.fingerprint, windows.tokens.tolist(), windows.lengths.tolist())
    path = work / f"reference-{key[:16]}.safetensors"
    with alone(path):
        if not path.exists():
            scratch = path.with_suffix(".states")  # named by what it holds: what a killed run left is used and deleted by the next
            scratch.mkdir(exist_ok=True)
            try:
                save_arrays(path, {"states": final_states(model, windows, scratch)})
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    states: NDArray[np.float32] = load_arrays(path)["states"]
    return states


def _score_window(original: NDArray[np.float32], ours: NDArray[np.float32], tokens: NDArray[np.int64], into: _Scores) -> None:
    """Compare two sets of logits [n, vocab] for one window of n tokens."""
    if not np.isfinite(ours).all():
        raise VerifyError("the artifact gives NaN or infinite logits")
    for start in range(0, len(tokens), ROWS_AT_ONCE):
        p, q = (_log_softmax(logits[start : start + ROWS_AT_ONCE]) for logits in (original, ours))
        into.kl.append(_kl(p, q))
        into.same.append(p.argmax(axis=1) == q.argmax(axis=1))
        following = tokens[start + 1 : start + 1 + len(p)]
        into.nll.append(-q[np.arange(len(following)), following])
        into.original_nll.append(-p[np.arange(len(following)), following])


def kl_of_rows(original: NDArray[np.float32], ours: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(original || ours) of each row of logits [n, vocab], nats."""
    steps = range(0, len(original), ROWS_AT_ONCE)
    return np.concatenate([_kl(*(_log_softmax(x[i : i + ROWS_AT_ONCE]) for x in (original, ours))) for i in steps])


def _kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=1)
    return result


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return result


def _text_score(name: str, scores: _Scores) -> TextScore:
    kl = np.concatenate(scores.kl)
    return TextScore(
        name=name,
        tokens=len(kl),
        kl_mean=float(kl.mean()),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1_agreement=float(np.concatenate(scores.same).mean()),
        perplexity=float(np.exp(np.concatenate(scores.nll).mean())),
        original_perplexity=float(np.exp(np.concatenate(scores.original_nll).mean())),
    )


def _measure_job(plan: Plan, heldout: Sequence[Text], windows: Any) -> dict[str, Any]:
    """A full context of held-out text, and the first words of each text to go on from."""
    prompts = [" ".join("".join(text.documents)[:400].split()[:12]) for text in heldout]
    tokens = [int(t) for w, n in zip(windows.tokens, windows.lengths, strict=True) for t in w[:n]]
    return {"context": plan.context, "tokens": tokens, "prompts": prompts, "generate": GENERATE}


def repeats(tokens: Sequence[int], n: int = 4) -> bool:
    """Whether a continuation goes in circles: more than half of its n-grams have been there before."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return bool(grams) and 1 - len(set(grams)) / len(grams) > LOOP_SHARE


def _find_problems(
    artifact: Artifact, model: Model, plan: Plan, heldout: Sequence[Text], target: Target, peak: int, kl: float
) -> list[str]:
    """Broken promises first, then surprises."""
    problems = []
    if peak > plan.budget:
        problems.append(f"peak memory {format_bytes(peak)} is over the budget of {format_bytes(plan.budget)}")
    lines = [line for text in heldout for line in "".join(text.documents).splitlines() if line.strip()]
    step = max(1, len(lines) // TOKENIZER_LINES)
    wrong = target.check_tokenizer(artifact.path, model, lines[::step][:TOKENIZER_LINES])
    if wrong:
        problems.append(f"{len(wrong)} lines are tokenized otherwise than by the original, the first: {wrong[0][:80]!r}")
    if kl > KL_SURPRISE * plan.predicted_kl and kl > 1e-3:
        problems.append(f"note: measured KL {kl:.4f} is more than {KL_SURPRISE:g} times the prediction {plan.predicted_kl:.4f}")
    return problems


def broken_promises(report: Report) -> list[str]:
    """The problems that make a build fail; notes do not."""
    return [p for p in report.problems if not p.startswith("note:")]


def _describe(model: Model) -> dict[str, Any]:
    keys = ("name", "model_type", "n_layers", "n_experts", "top_k", "hidden_size", "n_weights", "n_bytes")
    return {k: getattr(model, k) for k in keys}
