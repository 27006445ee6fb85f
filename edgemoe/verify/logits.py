"""This module compares the logits of the original and of an artifact: KL, perplexity and agreement by text."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import VerifyError
from edgemoe.base.progress import Progress
from edgemoe.base.storage import load_arrays, save_arrays
from edgemoe.base.types import F32, F64
from edgemoe.base.work import key_of, open_or_make, path_of
from edgemoe.ir import Model, TextScore
from edgemoe.stream.texts import Text
from edgemoe.stream.windows import WINDOW
from edgemoe.targets import Target

ROWS_AT_ONCE = 64  # of logits in float64


@dataclass
class _Scores:
    """Per-token figures of one text, filled window by window."""

    kl: list[F64] = field(default_factory=list)
    same: list[NDArray[np.bool_]] = field(default_factory=list)
    nll: list[F64] = field(default_factory=list)
    original_nll: list[F64] = field(default_factory=list)


def compare_logits(
    path: Path,
    model: Model,
    windows: Any,
    states: F32,
    names: Sequence[str],
    target: Target,
    *,
    settings: Mapping[str, bool] | None = None,
    progress: Progress | None = None,
) -> tuple[TextScore, ...]:
    """KL, perplexity and agreement of a file by text, on windows with known last states of the original [windows, length, hidden].

    `settings` are those of the run; the default are the settings for which the target predicts.

    Raises:
        VerifyError: the file does not run, or gives NaN.
    """
    from edgemoe.stream.passes import open_head

    scores = [_Scores() for _ in names]
    rows = [w[:n].tolist() for w, n in zip(windows.tokens, windows.lengths, strict=True)]

    def compare(number: int, logits: F32) -> None:
        tokens = np.array(rows[number])
        _score_window(head(states[number])[: len(tokens)], logits, tokens, scores[int(windows.domain[number])])
        if progress:
            progress(number + 1, len(rows))

    if progress:
        progress(0, len(rows))
    with open_head(model) as head:
        target.run(path, {"windows": rows, "vocab_size": model.vocab_size, **(settings or target.runs.compared)}, compare)
    return tuple(_text_score(name, s) for name, s in zip(names, scores, strict=True) if s.kl)


def _score_window(original: F32, ours: F32, tokens: NDArray[np.int64], into: _Scores) -> None:
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


def kl_of_rows(original: F32, ours: F32) -> F64:
    """KL(original || ours) of each row of logits [n, vocab], nats."""
    steps = range(0, len(original), ROWS_AT_ONCE)
    return np.concatenate([_kl(*(_log_softmax(x[i : i + ROWS_AT_ONCE]) for x in (original, ours))) for i in steps])


def _kl(p: F64, q: F64) -> F64:
    result: F64 = (np.exp(p) * (p - q)).sum(axis=1)
    return result


def _log_softmax(logits: F32) -> F64:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    result: F64 = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
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


def tokenize_heldout(model: Model, heldout: Sequence[Text], max_tokens: int) -> Any:
    """Held-out windows, every position of which is compared."""
    from edgemoe.stream.windows import tokenize

    return tokenize(model, heldout, max_tokens, WINDOW)


def reference_states(model: Model, windows: Any, work: Path) -> F32:
    """What `final_states` gives of the original on these windows, kept in `work` for the next budget."""
    from edgemoe.stream.passes import final_states

    work.mkdir(parents=True, exist_ok=True)
    path = path_of(
        work, "reference", key_of("reference", model.fingerprint, windows.tokens.tolist(), windows.lengths.tolist()), ".safetensors"
    )

    def make() -> F32:
        scratch = path.with_suffix(".states")  # named by its content, so that the next run uses and deletes what a killed run left
        scratch.mkdir(exist_ok=True)
        try:
            states = final_states(model, windows, scratch)
            save_arrays(path, {"states": states})
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return states

    states: F32 = open_or_make(path, lambda: load_arrays(path)["states"] if path.exists() else None, make)
    return states
