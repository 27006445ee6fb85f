"""Texts as they come from the web calibrate, or are refused before work starts, with the line that is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.stream.texts import SHIPPED, choose_texts, read_text

WORDS = "A sentence of some words that says nothing at all."


def jsonl(path: Path, *entries: object) -> Path:
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e, ensure_ascii=False)) + "\n" for e in entries), encoding="utf-8")
    return path


def test_characters_that_json_allows_in_a_text_end_no_line(tmp_path: Path) -> None:
    texts = ["one\u2028two", "three\u0085four\u2029", "five\x0bsix"]
    assert list(read_text(str(jsonl(tmp_path / "a.jsonl", *({"text": t} for t in texts)))).documents) == texts


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    body = json.dumps({"text": WORDS}) if name.endswith("jsonl") else WORDS
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + body.encode())
    assert "\ufeff" not in "".join(read_text(str(tmp_path / name)).documents)


def test_chat_messages_are_texts(tmp_path: Path) -> None:
    chat = {
        "messages": [
            {"role": "user", "content": "How?"},
            {"role": "assistant", "content": [{"type": "text", "text": "So."}, {"type": "image"}]},
        ]
    }
    assert read_text(str(jsonl(tmp_path / "a.jsonl", chat, {"text": "x"}))).documents == ("How?\n\nSo.", "x")


@pytest.mark.parametrize(
    "line",
    [
        {"text": None},
        {"text": 5},
        {"text": ["a"]},
        {"txt": "a"},
        [1],
        "nothing",
        '{"text": "\\ud800"}',
        '{"text": "a"',
        "[" * 10_000,
        "9" * 5000,
    ],
    ids=["null", "number", "list", "missing", "array", "no json", "surrogate", "cut", "deep", "long number"],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: object) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": WORDS}, line)
    with pytest.raises(ModelError, match=r"a\.jsonl: line 2: ") as caught:
        read_text(str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))


def test_repeated_paragraphs_are_held_out_only_where_they_are_new(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join([WORDS * 8] * 40 + [f"{WORDS} {n}" for n in range(4)]), encoding="utf-8")
    (first,), (last,) = choose_texts([str(path)], [])
    assert not set(first.documents) & set(last.documents) and len(last.documents) >= 3
    path.write_text("\n\n".join([WORDS] * 40) + "\n\n", encoding="utf-8")
    with pytest.raises(UsageError, match="only repeats itself") as caught:
        choose_texts([str(path)], [])
    assert "--heldout" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        " = A title = \n \n" + " \n".join(f" {WORDS} {n} \n" for n in range(30)),
        "".join(f"{WORDS} {n}\n" for n in range(30)),
        " ".join(f"{WORDS} {n}" for n in range(400)),
        "\r\n\r\n".join(f"{WORDS} {n}" for n in range(30)),
    ],
    ids=["wikitext", "lines", "one line", "windows"],
)
def test_every_layout_of_a_text_has_documents_of_which_some_are_held_out(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert "".join(read_text(str(path)).documents).split() == text.split()
    (first,), (last,) = choose_texts([str(path)], [])
    assert first.documents and last.documents


def test_shipped_texts_are_split_as_ever() -> None:
    for path in sorted((SHIPPED / "calibration").glob("*.txt")):
        raw = path.read_text(encoding="utf-8")
        parts = raw.split("\f") if "\f" in raw else [p + "\n\n" for p in raw.split("\n\n")]
        assert list(read_text(str(path)).documents) == [p for p in parts if p.strip()]


def test_pipes_devices_and_folders_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "folder.txt").mkdir()
    for name in ("pipe.txt", "zero.txt", "folder.txt"):
        with pytest.raises(ModelError, match="not a regular file"):
            read_text(str(tmp_path / name))
