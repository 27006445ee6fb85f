"""This module reads calibration and held-out texts, from the user's files or the shipped mix, as named and weighted documents.

Calibration never reads held-out text.  Held-out text is `--heldout`, else the last tenth of each calibration file's documents (which
calibration then leaves out), else the shipped held-out mix.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.base.storage import regular_size
from edgemoe.base.types import F64
from edgemoe.ir import Stats

SHIPPED = Path(__file__).parent / "data"
DEFAULT_TOKENS = 65_536  # of all calibration texts together
HELDOUT_SHARE = 0.1
MAX_BYTES = 2**30
PIECE = 2000  # characters of a document where a text has but one line
_SAME_BY_CHANCE = 200  # characters; different texts may share paragraphs that are shorter


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One text: documents in order, and its weight among the others."""

    name: str
    documents: tuple[str, ...]
    weight: float = 1.0

    @property
    def sha256(self) -> str:
        """Of the documents as used."""
        return hashlib.sha256("\x00".join(self.documents).encode()).hexdigest()


def text_weights(texts: Sequence[Text]) -> F64:
    """Weight of each text among all [D], summing to 1."""
    return np.array([t.weight for t in texts]) / sum(t.weight for t in texts)


def texts_key(texts: Sequence[Text]) -> list[tuple[str, float, str]]:
    """The properties of texts that decide a result made from them, for its key."""
    return [(t.name, t.weight, t.sha256) for t in texts]


def choose_texts(calibration: Sequence[str], heldout: Sequence[str]) -> tuple[tuple[Text, ...], tuple[Text, ...]]:
    """Calibration and held-out texts for what the user gave: FILE or FILE:WEIGHT, and FILE.

    Raises:
        UsageError: a weight that is no positive number.
        ModelError: a file that cannot be read or holds no text.
    """
    calibrate = tuple(read_text(spec) for spec in calibration)
    if heldout:
        held = tuple(read_text(spec) for spec in heldout)
    elif calibrate:
        split = [_split(text) for text in calibrate]
        calibrate, held = tuple(s[0] for s in split), tuple(s[1] for s in split)
    else:
        held = tuple(read_text(str(p)) for p in sorted((SHIPPED / "heldout").glob("*.txt")))
    if not calibrate:
        calibrate = tuple(read_text(str(p)) for p in sorted((SHIPPED / "calibration").glob("*.txt")))
    names = [text.name for text in calibrate]
    if len(set(names)) < len(names):
        raise UsageError(f"two calibration texts have the same name ({', '.join(names)})", hint="rename one: the name is the domain's name")
    seen = {d for text in calibrate for d in text.documents if len(d) > _SAME_BY_CHANCE}
    for text in held:
        if seen.intersection(text.documents):
            raise UsageError(f"held-out text {text.name} shares documents with the calibration text", hint="give other files to --heldout")
    return calibrate, held


def recall_texts(stats: Stats, given: Sequence[str]) -> tuple[Text, ...]:
    """Read the texts of statistics again (FILE or FILE:WEIGHT, or the shipped mix if none is given), whole or without a held-out tenth.

    Raises:
        UsageError: these are other texts; the message says which ones the statistics come from.
        ModelError: a file that cannot be read or holds no text.
    """
    known = [(d.name, d.weight, d.sha256) for d in stats.domains]
    whole = tuple(map(read_text, given)) or choose_texts((), ())[0]
    split = tuple(_split(text)[0] for text in whole if len(text.documents) > 1)
    for texts in (whole, split):
        if [(t.name, t.weight, t.sha256) for t in texts] == known:
            return texts
    named = ", ".join(f"{name} (weight {weight:g})" for name, weight, _ in known)
    found = ", ".join(f"{t.name} (weight {t.weight:g})" for t in whole) if given else "the shipped mix"
    raise UsageError(
        f"--calibration: {stats.folder} was made from {named}, and emit repairs and rounds on the same texts; found {found}",
        hint="give every --calibration again as calibrate or build had it, in the same order; none for the shipped mix",
    )


def read_text(spec: str) -> Text:
    """A text from "FILE" or "FILE:WEIGHT".

    A .jsonl file holds an object in each line, with a "text", or with chat "messages" whose contents become paragraphs.  Any other file is
    plain UTF-8, whose documents are parted by form feeds, else by empty lines, else by lines, else they are pieces of its one line.

    Raises:
        UsageError: a weight that is no positive number.
        ModelError: a file that cannot be read or holds no text; the message names the line where it can.
    """
    name, _, weight_text = spec.rpartition(":")
    weight = 1.0
    if name and not Path(spec).exists():
        try:
            weight = float(weight_text)
        except ValueError as error:
            raise UsageError(f"{spec!r}: {weight_text!r} is not a weight", hint="write FILE or FILE:WEIGHT, as in my.txt:3") from error
        if not 0 < weight < 1e6:
            raise UsageError(f"{spec!r}: the weight must be a positive number")
        spec = name
    path = Path(spec)
    try:
        if regular_size(path) > MAX_BYTES:
            raise ModelError(f"{path}: more than {MAX_BYTES} bytes of text", hint="a few megabytes are plenty")
        raw = path.read_text(encoding="utf-8-sig")  # a byte-order mark is no text
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
    documents = _read_jsonl(path, raw) if path.suffix == ".jsonl" else _split_documents(raw)
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise ModelError(f"{path}: holds no text", hint="give a file with some thousands of words")
    return Text(name=path.stem, documents=tuple(documents), weight=weight)


def _split_documents(raw: str) -> list[str]:
    if "\f" in raw:
        return raw.split("\f")
    if "\n\n" in raw:
        return [p + "\n\n" for p in raw.split("\n\n")]
    for parts in (re.split(r"(?<=\n)[ \t]+\n", raw), raw.splitlines(keepends=True)):  # WikiText's empty lines hold a blank
        if len(parts) > 1:
            return parts
    return [raw[start : start + PIECE] for start in range(0, len(raw), PIECE)]


def _read_jsonl(path: Path, raw: str) -> list[str]:
    documents = []
    for number, line in enumerate(raw.split("\n"), 1):  # not splitlines, which also splits at characters that JSON allows in a text
        if not line.strip():
            continue
        try:
            document = _document_of(json.loads(line))
            document.encode("utf-8")
        except (ValueError, TypeError, RecursionError) as error:
            raise ModelError(
                f"{path}: line {number}: {str(error)[:200]}", hint='a line is {"text": "..."} or {"messages": [...]}'
            ) from error
        documents.append(document)
    return documents


def _document_of(entry: object) -> str:
    """The text of a line, or the contents of its chat messages as paragraphs."""
    if not isinstance(entry, dict):
        raise TypeError(f"expected an object, found {type(entry).__name__}")
    if isinstance(messages := entry.get("messages"), list) and "text" not in entry:
        contents = [message.get("content") if isinstance(message, dict) else None for message in messages]
        parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        return "\n\n".join(text for text in texts if isinstance(text, str))
    if not isinstance(entry.get("text"), str):
        found = type(entry["text"]).__name__ if "text" in entry else "nothing"
        raise TypeError(f"'text' should be a text, found {found}")
    return str(entry["text"])


def _split(text: Text) -> tuple[Text, Text]:
    """First nine tenths of the documents for calibration, and what is new in the last tenth held out."""
    cut = len(text.documents) - max(1, round(len(text.documents) * HELDOUT_SHARE))
    if cut < 1:
        raise UsageError(f"calibration text {text.name} has a single document, so nothing can be held out", hint="add --heldout FILE")
    first = text.documents[:cut]
    seen = set(first)
    last = tuple(document for document in text.documents[cut:] if document not in seen)  # repeated paragraphs were calibrated on
    if not last:
        raise UsageError(f"calibration text {text.name} only repeats itself, so nothing can be held out", hint="add --heldout FILE")
    return Text(name=text.name, documents=first, weight=text.weight), Text(name=text.name, documents=last, weight=text.weight)
