"""A Reference compares files and changed models with the original in F32, on fixed windows of some texts: KL in nats per token.

A file runs in its target's own runtime; a changed model runs in transformers.  Scores of files are kept as lines of JSON, one for each
file, named by a hash of what the file was made from and of the windows; the files are not kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import VerifyError
from edgemoe.base.storage import hash_json
from edgemoe.base.types import F64
from edgemoe.ir import Model
from edgemoe.model.checkpoint import read_tensor
from edgemoe.stream.passes import final_states
from edgemoe.stream.texts import Text
from edgemoe.targets import Target, find_target
from edgemoe.verify.logits import kl_of_rows, reference_states, tokenize_heldout

ROWS_AT_ONCE = 128  # of logits in float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One measured file: bytes, means over the tokens of each window (nats per token, share), 99th percentiles of KL of each domain."""

    size: int
    kl: tuple[float, ...]
    same: tuple[float, ...]
    nll: tuple[float, ...]
    p99: tuple[float, ...]


class Reference:
    """Windows of some texts and the original's last states on them: what files and changed models are compared with.

    Args:
        model: the original.
        texts: held-out texts, or those that a search may measure on.
        tokens: of all texts together.
        work: folder for the states and the scores.
        target: whose runtime runs files; None: GGUF.
    """

    def __init__(self, model: Model, texts: Sequence[Text], tokens: int, work: Path, target: Target | None = None) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.model, self.target, self.names, self.work = model, target or find_target("gguf"), tuple(t.name for t in texts), work
        self.windows = tokenize_heldout(model, texts, tokens)
        self.states = reference_states(model, self.windows, work)
        self.head = read_tensor(model.folder, model.output_matrix)
        self.key = hash_json(model.fingerprint, self.windows.tokens.tolist(), self.windows.lengths.tolist())
        self.log = work / "results.jsonl"
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.known: dict[str, Score] = {}
        for key, score in map(json.loads, lines):
            fields: dict[str, Any] = {name: tuple(value) if name != "size" else value for name, value in score.items()}
            self.known[key] = Score(**fields)

    # ----------------------------------------------------------------------------------------------------- files, remembered
    def knows(self, *made_from: object) -> bool:
        """Whether a file was measured before."""
        return hash_json(self.key, *made_from) in self.known

    def measure(self, make: Callable[[], Path], *made_from: object) -> Score:
        """Make a file unless it was measured before, measure it, delete it."""
        key = hash_json(self.key, *made_from)
        if key not in self.known:
            path = make()
            self.remember(self.score(path), *made_from)
            path.unlink()
        return self.known[key]

    def score_of(self, *made_from: object) -> Score:
        """What was measured before."""
        return self.known[hash_json(self.key, *made_from)]

    def remember(self, score: Score, *made_from: object) -> None:
        """Keep what was measured."""
        key = hash_json(self.key, *made_from)
        self.known[key] = score
        with self.log.open("a") as log:
            log.write(json.dumps([key, asdict(score)]) + "\n")

    # ----------------------------------------------------------------------------------------------------------- measuring
    def score(self, path: Path) -> Score:
        """Run a file, with what predictions are for: the weights' own error is all that is left."""
        rows = [w[:n].tolist() for w, n in zip(self.windows.tokens, self.windows.lengths, strict=True)]
        found: list[tuple[F64, F64, F64]] = []

        def compare(number: int, logits: NDArray[np.float32]) -> None:
            if not np.isfinite(logits).all():
                raise VerifyError(f"{path.name} gives NaN or infinite logits")
            found.append(compare_window(self.states[number, : len(rows[number])] @ self.head.T, logits, np.array(rows[number])))

        self.target.run(path, {"windows": rows, "vocab_size": self.model.vocab_size, **self.target.runs.compared}, compare)
        kl, same, nll = (tuple(float(f[i].mean()) for f in found) for i in range(3))
        tokens = [np.concatenate([f[0] for f, d in zip(found, self.windows.domain, strict=True) if d == n]) for n in range(len(self.names))]
        return Score(size=path.stat().st_size, kl=kl, same=same, nll=nll, p99=tuple(float(np.quantile(t, 0.99)) for t in tokens))

    def kl_of_file(self, path: Path) -> float:
        """KL of a file, the mean over texts of the mean over their tokens."""
        return float(self.by_text(np.array(self.score(path).kl) * self.windows.lengths).mean())

    def kl_of_model(self, changed: Model, kept: Sequence[Sequence[int]] | None = None) -> F64:
        """KL of a changed model in transformers by text [D], with `kept` of these experts alone."""
        states = final_states(changed, self.windows, self.work, kept=kept)
        pairs = zip(self.states, states, self.windows.lengths, strict=True)
        return self.by_text(np.array([kl_of_rows(a[:n] @ self.head.T, b[:n] @ self.head.T).sum() for a, b, n in pairs]))

    # ------------------------------------------------------------------------------------------------------------- summaries
    def by_text(self, sums: F64) -> F64:
        """Sums over the tokens of each window -> the mean over the tokens of each text [D]."""
        count = len(self.names)
        found: F64 = np.bincount(self.windows.domain, sums, count) / np.bincount(self.windows.domain, self.windows.lengths, count)
        return found

    def split(self, values: Sequence[float]) -> list[F64]:
        """Values of the windows by text."""
        return [np.array(values)[self.windows.domain == d] for d in range(len(self.names))]

    def mean_kl(self, score: Score) -> float:
        """KL in nats per token, the mean over texts of the mean over their windows."""
        return float(np.mean([part.mean() for part in self.split(score.kl)]))

    def perplexity(self, score: Score, texts: Sequence[int]) -> float:
        """Per token, over the windows of some texts alike."""
        return float(np.exp(np.mean([self.split(score.nll)[d].mean() for d in texts])))


def compare_window(original: NDArray[np.float32], ours: NDArray[np.float32], tokens: NDArray[np.int64]) -> tuple[F64, F64, F64]:
    """Of every token of a window: KL(original || ours) in nats, whether the first choice is the same, and its surprise (one less)."""
    kl, same, nll = [], [], []
    for start in range(0, len(tokens), ROWS_AT_ONCE):
        p, q = (_log_softmax(logits[start : start + ROWS_AT_ONCE]) for logits in (original, ours))
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
        following = tokens[start + 1 : start + 1 + len(q)]
        nll.append(-q[np.arange(len(following)), following])
    return np.concatenate(kl), np.concatenate(same).astype(np.float64), np.concatenate(nll)


def _log_softmax(logits: NDArray[np.float32]) -> F64:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    found: F64 = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return found


def mean_and_error(parts: Sequence[F64]) -> tuple[float, float]:
    """Mean over domains of the mean over their windows, and its standard error (domains are given, windows are a sample of each)."""
    mean = float(np.mean([p.mean() for p in parts]))
    return mean, float(np.sqrt(sum(p.var(ddof=1) / len(p) for p in parts))) / len(parts)


def remembered(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` gave when it was called for this file, as JSON holds it."""
    if not path.exists():
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())
