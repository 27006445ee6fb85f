"""This module cuts texts into windows of the model's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.base.types import F64
from edgemoe.ir import Model
from edgemoe.model.tokenizer import Encode, load_tokenizer
from edgemoe.stream.texts import Text

CHUNK_TOKENS = 2048
PIECE = 4096  # characters of a document that are encoded at least
MARGIN = 64  # tokens before the place where a document was cut; only the last few of them depend on what follows
WINDOW = 512  # tokens of one window of calibration or held-out text


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Token windows [n, length], the last of a text padded; `lengths` [n] counts the real tokens of each."""

    tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]
    domain: NDArray[np.int64]  # [n]

    @property
    def real(self) -> NDArray[np.bool_]:
        """Which positions hold tokens [n, length]; the others are padding."""
        mask: NDArray[np.bool_] = np.arange(self.tokens.shape[1])[None] < self.lengths[:, None]
        return mask

    def count_tokens(self, domains: int) -> NDArray[np.int64]:
        """Tokens of each domain [D]."""
        return np.bincount(self.domain, self.lengths, domains).astype(np.int64)

    def token_weights(self, weights: F64) -> F64:
        """Weight of each token of a window [n], where the tokens of a domain share its weight [D]."""
        shared: F64 = (weights / self.count_tokens(len(weights)))[self.domain]
        return shared

    def take(self, index: Sequence[int] | NDArray[np.int64]) -> Windows:
        """Some of the windows."""
        return Windows(tokens=self.tokens[index], lengths=self.lengths[index], domain=self.domain[index])

    def chunks(self) -> list[NDArray[np.int64]]:
        """Window indices in chunks of about CHUNK_TOKENS tokens."""
        step = max(1, CHUNK_TOKENS // self.tokens.shape[1])
        return [np.arange(i, min(i + step, len(self.tokens))) for i in range(0, len(self.tokens), step)]


def tokenize(model: Model, texts: Sequence[Text], max_tokens: int, window: int) -> Windows:
    """Cut texts into windows of the model's tokens; each text gives the same number of tokens, or all of its tokens if it has fewer.

    Raises:
        ModelError: there is no tokenizer, or a text has no tokens.
    """
    encode = _encoder_of(model)
    length = min(window, model.context_length)
    share = max(max_tokens // len(texts), 2)
    tokens, lengths, domain = [], [], []
    for number, text in enumerate(texts):
        ids: list[int] = []
        for document in text.documents:
            ids += _first_tokens(encode, document, share - len(ids))
            if len(ids) >= share:
                break
        if len(ids) < 2:
            raise ModelError(f"text {text.name!r} gives {len(ids)} tokens", hint="give a file with some thousands of words")
        if max(ids) >= model.vocab_size:
            raise ModelError(f"{model.folder}: the tokenizer gives id {max(ids)}, but vocab_size is {model.vocab_size}")
        for start in range(0, len(ids), length):
            part = ids[start : start + length]
            whole = model.causal or len(part) == length or len(ids) < length  # padding is seen by tokens that look ahead
            if len(part) > 1 and whole:
                tokens.append(part + [0] * (length - len(part)))
                lengths.append(len(part))
                domain.append(number)
    return Windows(tokens=np.array(tokens), lengths=np.array(lengths), domain=np.array(domain))


def _encoder_of(model: Model) -> Encode:
    if not model.architecture:
        return load_tokenizer(Path(model.folder), special=True)
    from edgemoe.model.gguf_model import first_file
    from edgemoe.stream.engine.vocabulary import load_encoder

    return load_encoder(first_file(model))


def _first_tokens(encode: Encode, document: str, count: int) -> list[int]:
    """The first `count` tokens of a document, of which no more is encoded than that takes: a document may have a gigabyte."""
    size = PIECE + 8 * count
    while True:
        ids = encode(document[:size])
        if size >= len(document) or len(ids) >= count + MARGIN:
            return ids[:count]
        size *= 2
