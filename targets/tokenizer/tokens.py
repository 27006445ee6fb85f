"""This module collects the tokens of a tokenizer file into one checked list, with one entry for each row of the embedding.

llama.cpp aborts the process if a token is listed twice, and cuts a token at a NUL byte, so both are refused here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from edgemoe.base.errors import ModelError

MAX_DEPTH = 8  # of nested sequences
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.h: enum llama_token_type

T = TypeVar("T")


def expect(value: Any, kind: type[T], file: Path, name: str) -> T:
    """The value, if it is of this type (a bool is no int).

    Raises:
        ModelError: the value is of another type; the message names the file and the field.
    """
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        found = "nothing" if value is None else type(value).__name__
        raise ModelError(f"{file}: {name} should be {kind.__name__}, found {found}")
    return value


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is matched in the text before everything else."""

    token_id: int
    text: str
    special: bool


def read_added(file: Path, name: str, entry: Any, token_id: Any) -> AddedToken:
    """One entry of `added_tokens` (tokenizer.json) or `added_tokens_decoder` (tokenizer_config.json).

    Raises:
        ModelError: the entry is malformed, or its token strips or needs blanks around it, which llama.cpp cannot do for text tokens.
    """
    values = expect(entry, dict, file, name)
    special = expect(values.get("special", False), bool, file, f"{name}.special")
    for flag in ("lstrip", "rstrip", "single_word"):
        # On special tokens the flags act only where a prompt spells them out, so they change no plain text.
        if expect(values.get(flag, False), bool, file, f"{name}.{flag}") and not special:
            raise ModelError(f"{file}: {name}.{flag} is true, which llama.cpp cannot do", hint="set it to false, or mark the token special")
    return AddedToken(expect(token_id, int, file, f"{name}.id"), expect(values.get("content"), str, file, f"{name}.content"), special)


def list_added(file: Path, tokenizer: dict[str, Any]) -> list[AddedToken]:
    """The `added_tokens` of a tokenizer.json."""
    entries = expect(tokenizer.get("added_tokens") or [], list, file, "added_tokens")
    return [
        read_added(file, f"added_tokens[{i}]", entry, entry.get("id") if isinstance(entry, dict) else None)
        for i, entry in enumerate(entries)
    ]


def flatten(file: Path, name: str, node: Any, inner: str, depth: int = 0) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor, sequences unrolled; null is no step."""
    if node is None:
        return []
    if depth > MAX_DEPTH:
        raise ModelError(f"{file}: {name} is nested more than {MAX_DEPTH} deep")
    step = expect(node, dict, file, name)
    if step.get("type") != "Sequence":
        return [step]
    nodes = expect(step.get(inner), list, file, f"{name}.{inner}")
    return [part for node in nodes for part in flatten(file, name, expect(node, dict, file, f"{name}.{inner}"), inner, depth + 1)]


@dataclass(slots=True)
class TokenList:
    """Tokens by id while they are collected; `finish` fills the other ids with unused tokens."""

    file: Path
    size: int
    texts: list[str | None] = field(init=False)
    types: list[int] = field(init=False)
    scores: list[float] = field(init=False)
    ids: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.texts = [None] * self.size
        self.types = [UNUSED] * self.size
        self.scores = [0.0] * self.size
        self.ids = {}

    def put(self, token_id: Any, text: Any, kind: int, name: str, score: float = 0.0) -> None:
        """Set one token; the same text may come again for the same id, with another type.

        Raises:
            ModelError: the text or the id is of another type, out of range, or in conflict with another token.
        """
        expect(text, str, self.file, f"{name}: the token {token_id!r:.40}")
        expect(token_id, int, self.file, f"{name}: the id of {text!r:.40}")
        if not 0 <= token_id < self.size:
            raise ModelError(f"{self.file}: {name}: {text!r:.40} has id {token_id}, but the model's embedding has {self.size} rows")
        if not text or "\0" in text or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
            raise ModelError(f"{self.file}: {name}: token {token_id} is {text!r:.40}, which a GGUF cannot hold")
        if self.ids.setdefault(text, token_id) != token_id:
            raise ModelError(f"{self.file}: {name}: {text!r:.40} has the ids {self.ids[text]} and {token_id}")
        if self.texts[token_id] not in (None, text):
            raise ModelError(f"{self.file}: {name}: id {token_id} is both {self.texts[token_id]!r:.40} and {text!r:.40}")
        self.texts[token_id], self.types[token_id], self.scores[token_id] = text, kind, score

    def check_no_gap(self, last: int, name: str) -> None:
        """Refuse a vocabulary with a gap: every id up to `last` must be taken."""
        for token_id, text in enumerate(self.texts[: last + 1]):
            if text is None:
                raise ModelError(f"{self.file}: {name} has no token with id {token_id}", hint="the file is damaged: download it again")

    def finish(self, unused_score: float = 0.0) -> tuple[str, ...]:
        """All texts, with `[PAD{i}]` of type UNUSED for the rows of the embedding that no token uses."""
        for token_id, text in enumerate(self.texts):
            if text is None:
                self.put(token_id, f"[PAD{token_id}]", UNUSED, "padding", unused_score)
        return tuple(text for text in self.texts if text is not None)
