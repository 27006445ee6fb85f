"""Print what a bundled model is: held-out perplexity beside n-gram baselines, and which experts each domain uses.

    python examples/describe_model.py examples/tiny-moe

The n-gram models (interpolated, absolute discount 0.75, Kneser-Ney lower orders) are trained on the shipped calibration text of the same
domain, 90 to 180 thousand tokens; `tech` has none of its own and uses all four.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from edgemoe.calibrate.collect import collect_stats
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.inspect import inspect_model
from edgemoe.stream.passes import final_states
from edgemoe.stream.texts import SHIPPED, read_text
from edgemoe.stream.windows import tokenize

DISCOUNT = 0.75


class KneserNey:
    """Interpolated Kneser-Ney of order 1 to 3 over token ids."""

    def __init__(self, tokens: list[int], vocab: int) -> None:
        self.vocab = vocab
        trigrams = Counter(zip(tokens, tokens[1:], tokens[2:], strict=False))
        bigrams = Counter(zip(tokens, tokens[1:], strict=False))
        self.orders = [self._level((k[:-1], k[-1], n) for k, n in trigrams.items())]
        self.orders.append(self._level(((a,), b, 1) for _, a, b in trigrams))  # continuation counts
        self.raw = self._level(((a,), b, n) for (a, b), n in bigrams.items())
        self.unigram = Counter(b for _, b in bigrams)
        self.n_bigrams = len(bigrams)

    @staticmethod
    def _level(rows) -> dict[tuple[int, ...], dict[int, int]]:
        level: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
        for context, token, n in rows:
            level[context][token] = level[context].get(token, 0) + n
        return level

    def nats(self, history: tuple[int, ...], token: int, order: int) -> float:
        """-log p(token | history) with the last `order` - 1 tokens."""
        p = max(self.unigram[token] - DISCOUNT, 0) / self.n_bigrams + DISCOUNT * len(self.unigram) / self.n_bigrams / self.vocab
        levels = [self.raw] if order == 2 else [self.orders[1], self.orders[0]]
        for level in levels:
            context = history[-1:] if level is not self.orders[0] else history[-2:]
            seen = level.get(context)
            if seen:
                total = sum(seen.values())
                p = max(seen.get(token, 0) - DISCOUNT, 0) / total + DISCOUNT * len(seen) / total * p
        return -math.log(p)


def main() -> None:
    """Print two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    folder = parser.parse_args().model
    model, tok = inspect_model(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    held = {p.stem: p for p in sorted((SHIPPED / "heldout").glob("*.txt"))}
    ids = {p.stem: tok.encode(p.read_text(encoding="utf-8")).ids for p in sorted((SHIPPED / "calibration").glob("*.txt"))}
    head = read_tensor(model.folder, model.output_matrix)
    print("| held-out | nats/token | perplexity | bigram | trigram (nats) |\n|---|---|---|---|---|")
    for name, path in held.items():
        windows = tokenize(model, [read_text(str(path))], 16_384, 256)
        with tempfile.TemporaryDirectory() as scratch:
            states = final_states(model, windows, Path(scratch))
        ngram = KneserNey(ids.get(name) or [t for part in ids.values() for t in part], model.vocab_size)
        nats, two, three = [], [], []
        for i, length in enumerate(windows.lengths):
            row = windows.tokens[i, :length].tolist()
            logits = states[i, :length] @ head.T
            logits -= logits.max(axis=1, keepdims=True)
            log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            for t in range(2, length):
                nats.append(-float(log_p[t - 1, row[t]]))
                two.append(ngram.nats(tuple(row[:t]), row[t], 2))
                three.append(ngram.nats(tuple(row[:t]), row[t], 3))
        print(f"| {name} | {np.mean(nats):.3f} | {math.exp(np.mean(nats)):.1f} | {np.mean(two):.3f} | {np.mean(three):.3f} |", flush=True)
    texts = [read_text(str(p)) for p in sorted((SHIPPED / "calibration").glob("*.txt"))]
    with tempfile.TemporaryDirectory() as scratch:
        stats = collect_stats(model, texts, Path(scratch), max_tokens=32_768)
        print("\n| layer | domain | " + " | ".join(f"e{e}" for e in range(model.n_experts)) + " |\n" + "|---" * (model.n_experts + 2) + "|")
        for layer in range(model.n_layers):
            count = stats.arrays(layer)["count"]
            share = 1000 * count / count.sum(axis=1, keepdims=True)
            for d, text in enumerate(texts):
                print(f"| {layer} | {text.name} | " + " | ".join(f"{s:.0f}" for s in share[d]) + " |")


if __name__ == "__main__":
    main()
