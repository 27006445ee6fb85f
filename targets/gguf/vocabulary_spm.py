"""This module reads tokens and scores for llama.cpp's SPM tokenizer from a tokenizer.model, or from a tokenizer.json made from one.

llama.cpp merges the neighbours whose union is the token of highest score, leftmost first (src/llama-vocab.cpp, llm_tokenizer_spm_session).
A tokenizer.json merges listed pairs in listed order.  Both agree if the scores follow this order and every split of a token is listed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgemoe.base.errors import ModelError
from edgemoe.model.tokenizer import MAX_TOKENIZER
from edgemoe.targets.gguf.vocabulary_bpe import check_model, put_tokens, read_merges
from edgemoe.targets.tokenizer.tokens import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    AddedToken,
    TokenList,
    expect,
    flatten,
    list_added,
)

SPACE = "\u2581"  # what SentencePiece writes for a blank
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_BPE = 2  # sentencepiece_model.proto: TrainerSpec.ModelType


# -------------------------------------------------------------------------------------------------------- tokenizer.model
def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _read_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a protobuf message: (number, int, or bytes for every other kind)."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        if key & 7 == 0:
            value, at = _read_varint(data, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, at = _read_varint(data, at)
        else:
            size = {1: 8, 5: 4}[key & 7]
        if at + size > len(data):
            raise ValueError(f"a field ends {at + size - len(data)} bytes after its message")
        yield key >> 3, data[at : at + size]
        at += size


def _read_proto(file: Path) -> tuple[list[tuple[str, float, int]], dict[int, Any], dict[int, Any]]:
    """Pieces (text, score, type), the trainer's and the normalizer's settings by field number (sentencepiece_model.proto)."""
    try:
        if file.stat().st_size > MAX_TOKENIZER:
            raise ModelError(f"{file}: {file.stat().st_size} bytes is too large for a tokenizer")
        pieces: list[tuple[str, float, int]] = []
        specs: dict[int, dict[int, Any]] = {2: {}, 3: {}}
        for number, value in _read_fields(file.read_bytes()):
            if number == 1:
                piece = dict(_read_fields(value))
                score = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
                pieces.append((piece[1].decode("utf-8"), score, int(piece.get(3, NORMAL))))
            elif number in specs:
                specs[number] = dict(_read_fields(value))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{file}: not a SentencePiece model: {error}", hint="download it again") from error
    return pieces, specs[2], specs[3]


def read_model(file: Path, tokens: TokenList) -> tuple[bool, dict[str, int | None]]:
    """Fill the tokens of a tokenizer.model; types are numbered as in a GGUF.

    Returns:
        Whether a blank is put before the text, and the ids of bos, eos, unk and pad.

    Raises:
        ModelError: malformed, or something that llama.cpp cannot do.
    """
    pieces, trainer, normalizer = _read_proto(file)
    if trainer.get(3, 1) != _BPE:
        raise ModelError(f"{file}: trainer_spec.model_type is {trainer.get(3, 1)}, only BPE (2) is supported")
    for refused, name in (
        (bool(normalizer.get(2)), "normalizer_spec.precompiled_charsmap is set"),
        (normalizer.get(4, 1), "normalizer_spec.remove_extra_whitespaces is true"),
        (not normalizer.get(5, 1), "normalizer_spec.escape_whitespaces is false"),
        (trainer.get(24, 0), "trainer_spec.treat_whitespace_as_suffix is true"),
    ):
        if refused:
            raise ModelError(f"{file}: {name}, which llama.cpp's SPM tokenizer cannot do")
    for token_id, (text, score, kind) in enumerate(pieces):
        if not math.isfinite(score) or not NORMAL <= kind <= BYTE:
            raise ModelError(f"{file}: pieces[{token_id}] has score {score} and type {kind}")
        # llama.cpp looks for user-defined tokens in the text as it is, before blanks are replaced.
        tokens.put(token_id, text.replace(SPACE, " ") if kind == USER_DEFINED else text, kind, f"pieces[{token_id}]", score)
    _check_bytes(file, tokens)
    ids: dict[str, int | None] = {}
    for name, number, default in (("unk", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1)):
        value = expect(trainer.get(number, default), int, file, f"trainer_spec.{name}_id")
        ids[name] = value if 0 <= value < 2**31 else None  # -1, for none, is written as 2^64 - 1
        if ids[name] is not None and value >= len(pieces):
            raise ModelError(f"{file}: trainer_spec.{name}_id is {value}, but there are {len(pieces)} pieces")
    return bool(normalizer.get(3, 1)), ids


def _check_bytes(file: Path, tokens: TokenList) -> None:
    """Check that every byte is a token, because llama.cpp stops the process at a character if neither it nor its bytes are tokens."""
    missing = sorted(_BYTES - tokens.ids.keys())
    if missing:
        raise ModelError(f"{file}: {len(missing)} of the 256 byte tokens are missing, first {missing[0]}", hint="byte_fallback is needed")


# --------------------------------------------------------------------------------------------------------- tokenizer.json
def read_json_model(file: Path, tokenizer: dict[str, Any], tokens: TokenList) -> None:
    """Fill the tokens of a tokenizer.json that was made from a SentencePiece BPE; scores follow the order of the merges.

    Raises:
        ModelError: the file is malformed, or its merges are not those of SentencePiece's rule.
    """
    model = expect(tokenizer.get("model"), dict, file, "model")
    check_model(file, model, byte_fallback=True)
    if model.get("ignore_merges"):
        raise ModelError(f"{file}: model.ignore_merges is true, which llama.cpp's SPM tokenizer cannot do")
    vocab = expect(model.get("vocab"), dict, file, "model.vocab")
    added = list_added(file, tokenizer)
    put_tokens(tokens, vocab, added)
    unknown = model.get("unk_token")
    for text, token_id in vocab.items():
        if text in _BYTES:
            tokens.types[token_id] = BYTE
        elif text == unknown:
            tokens.types[token_id] = UNKNOWN
    _check_bytes(file, tokens)
    tokens.scores = [-float(tokens.size)] * tokens.size
    texts = vocab.keys() - _BYTES - {token.text for token in added}
    for text, rank in _rank_merges(file, read_merges(file, model, vocab), texts).items():
        tokens.scores[vocab[text]] = -float(rank)


def _rank_merges(file: Path, merges: list[tuple[str, str]], texts: set[str]) -> dict[str, int]:
    """The order in which tokens are merged.

    Raises:
        ModelError: a token's splits are not adjacent in the list, or one is missing; merging by score would then tokenize otherwise.
    """
    ranks: dict[str, int] = {}
    last = ""
    for left, right in merges:
        text = left + right
        if text in ranks and text != last:
            raise ModelError(f"{file}: model.merges lists the splits of {text!r:.40} apart, so it is not from a SentencePiece model")
        ranks.setdefault(text, len(ranks))
        last = text
    listed = set(merges)
    made = ranks.keys() | {text for text in texts if len(text) == 1}
    for text in sorted(texts):
        for i in range(1, len(text)):
            if text[:i] in made and text[i:] in made and (text[:i], text[i:]) not in listed:
                raise ModelError(
                    f"{file}: model.merges lacks {text[:i]!r:.40} {text[i:]!r:.40}, so it is not from a SentencePiece model",
                    hint="llama.cpp has no tokenizer that keeps to the listed merges on whole texts",
                )
    return ranks


def read_prefix(file: Path, tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json puts a blank before the text; blanks must become U+2581 and the text must stay one piece.

    llama.cpp always puts the blank; Metaspace with `first` or `always` does not put it before a text that starts with a blank.

    Raises:
        ModelError: the tokenizer changes the text in another way.
    """
    normalizers = flatten(file, "normalizer", tokenizer.get("normalizer"), "normalizers")
    prefix = replaced = False
    for node in normalizers:
        if node.get("type") == "Prepend" and node.get("prepend") == SPACE and not replaced:
            prefix = True
        elif node.get("type") == "Replace" and (node.get("pattern"), node.get("content")) == ({"String": " "}, SPACE):
            replaced = True
        elif node.get("type") != "NFC":  # see vocabulary_bpe: the same for text that is NFC
            raise ModelError(f"{file}: normalizer {node.get('type')!r:.40} is not supported with byte_fallback")
    for node in flatten(file, "pre_tokenizer", tokenizer.get("pre_tokenizer"), "pretokenizers"):
        scheme = node.get("prepend_scheme", "always" if node.get("add_prefix_space", True) else "never")
        whole = node.get("split", True) is False and scheme in ("always", "first", "never")
        idle = (node.get("type"), node.get("pattern"), node.get("behavior")) == ("Split", {"String": " "}, "MergedWithPrevious")
        if node.get("type") == "Metaspace" and node.get("replacement") == SPACE and whole:
            prefix, replaced = prefix or scheme != "never", True
        elif not (idle and replaced):
            raise ModelError(f"{file}: pre_tokenizer {node.get('type')!r:.40} is not supported with byte_fallback: it cuts the text")
    if not replaced:
        raise ModelError(f"{file}: normalizer and pre_tokenizer leave blanks as they are, not supported with byte_fallback")
    return prefix


def check_same(file: Path, tokenizer: dict[str, Any], tokens: TokenList) -> None:
    """Refuse a tokenizer.json that differs from the tokenizer.model beside it."""
    model = expect(tokenizer.get("model"), dict, file, "model")
    check_model(file, model, byte_fallback=True)
    for text, token_id in expect(model.get("vocab"), dict, file, "model.vocab").items():
        found = tokens.ids.get(text, tokens.ids.get(text.replace(SPACE, " ")))
        if found is not None and found != token_id:
            raise ModelError(f"{file}: model.vocab has {text!r:.40} as {token_id!r:.40}, tokenizer.model as {found}")


def put_added(tokens: TokenList, added: list[AddedToken]) -> None:
    """Put tokens that were added to a tokenizer.model; they are matched in the text, so no merge may give them."""
    score = min(tokens.scores, default=0.0) - 1.0
    for i, token in enumerate(added):
        known = tokens.ids.get(token.text) == token.token_id
        if known and tokens.types[token.token_id] in (UNKNOWN, CONTROL, UNUSED) and token.special:
            continue
        text = token.text if token.special else token.text.replace(SPACE, " ")
        tokens.put(token.token_id, text, CONTROL if token.special else USER_DEFINED, f"added_tokens[{i}]", score)
