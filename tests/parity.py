"""Logits of one text by transformers, the layer stream and llama.cpp, and how far apart they are."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from tiny import flat_plan, flat_stats, small_tokenizer

from edgemoe.ir import Artifact, Model, Plan
from edgemoe.stream.layers import LayerStream
from edgemoe.stream.passes import final_states
from edgemoe.stream.texts import SHIPPED
from edgemoe.stream.windows import Windows
from edgemoe.targets.gguf.run import run
from edgemoe.targets.gguf.writer import write

N_TOKENS = 512
MAX_KL, MIN_SAME, MAX_DIFF, LEFT_OUT = 1e-6, 0.995, 2e-2, 0.01
UNEVEN = [(0, 2, 3, 5, 7), (1, 2, 4, 5, 6)]  # kept experts of the two layers: different ones, none of them the first five


@functools.cache
def heldout_tokens() -> tuple[int, ...]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(small_tokenizer(), ensure_ascii=False))  # its tokens are among the bundled models' too
    texts = [(SHIPPED / "heldout" / f"{name}.txt").read_text(encoding="utf-8")[:4000] for name in ("english", "german", "python", "math")]
    return tuple(token for text in texts for token in tokenizer.encode(text, add_special_tokens=False).ids[: N_TOKENS // len(texts)])


@functools.cache
def original_logits(folder: Path) -> NDArray[np.float32]:
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}
    module = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.inference_mode():
        logits: NDArray[np.float32] = module(torch.tensor([heldout_tokens()])).logits[0].numpy()
    return logits


def llama_logits(path: Path, model: Model) -> NDArray[np.float32]:
    found = []
    job = {"windows": [list(heldout_tokens())], "vocab_size": model.vocab_size, "exact": True, "repack": False}
    run(path, job, lambda _, logits: found.append(logits))
    return found[0]


def stream_logits(model: Model, work: Path, kept: Sequence[Sequence[int]] | None = None) -> NDArray[np.float32]:
    tokens = np.array([heldout_tokens()])
    windows = Windows(tokens=tokens, lengths=np.array([N_TOKENS]), domain=np.array([0]))
    work.mkdir(exist_ok=True)
    states = final_states(model, windows, work, kept)[0]
    _, output, _ = LayerStream(model).head()
    logits: NDArray[np.float32] = states @ output.cpu().numpy().T
    return logits


def emit(model: Model, out: Path, plan: Plan | None = None, *, seed: int | None = None, shard_max: int = 0) -> Artifact:
    out.mkdir(parents=True, exist_ok=True)
    return write(model, flat_stats(model, out / "stats", seed=seed), plan or flat_plan(model), out, shard_max)


def judge(expected: NDArray[np.float32], found: NDArray[np.float32]) -> dict[str, float]:
    """How far apart two sets of logits are.

    Both sides compute in float32 but add in another order, so that a router's tie may fall the other way: such a token has another expert
    and honestly other logits.  `max_diff` therefore leaves out the worst hundredth of the tokens; the mean KL leaves out none.
    """
    p, q = (torch.log_softmax(torch.from_numpy(x.astype(np.float64)), -1) for x in (expected, found))
    worst = np.sort(np.abs(expected - found).max(axis=1))
    return {
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "same": float((expected.argmax(1) == found.argmax(1)).mean()),
        "max_diff": float(worst[: len(worst) - int(LEFT_OUT * len(worst))][-1]),
        "worst": float(worst[-1]),
        "std": float(expected.std()),
    }


def agrees(figures: dict[str, float]) -> bool:
    return figures["kl"] <= MAX_KL and figures["same"] >= MIN_SAME and figures["max_diff"] <= MAX_DIFF


def tensor_hashes(path: Path) -> dict[str, str]:
    return {t.name: hashlib.sha256(t.data.tobytes()).hexdigest() for t in gguf.GGUFReader(path).tensors}
