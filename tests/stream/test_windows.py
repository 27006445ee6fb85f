"""Tokens come from the checkpoint's own tokenizer file and from nothing else in its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import MODEL
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.base.errors import ModelError
from edgemoe.model.inspect import inspect_model
from edgemoe.model.tokenizer import load_tokenizer
from edgemoe.stream.layers import LayerStream
from edgemoe.stream.texts import SHIPPED, Text
from edgemoe.stream.windows import _first_tokens, tokenize

TEXTS = sorted((SHIPPED / "calibration").glob("*.txt"))


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.stem)
def test_tokens_are_those_of_transformers(path: Path) -> None:
    from transformers import AutoTokenizer

    text = path.read_text(encoding="utf-8")[:30_000] + "<|endoftext|> a <|im_end|>"
    expected = AutoTokenizer.from_pretrained(MODEL)(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert load_tokenizer(MODEL, special=True)(text) == expected


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 3000), start=st.integers(0, 50_000), path=st.sampled_from(TEXTS))
def test_the_first_tokens_of_a_long_document_are_those_of_the_whole(count: int, start: int, path: Path) -> None:
    document, encode = path.read_text(encoding="utf-8")[start : start + 60_000], load_tokenizer(MODEL, special=True)
    assert _first_tokens(encode, document, count) == encode(document)[:count]


def test_of_a_huge_document_no_more_is_encoded_than_needed() -> None:
    seen: list[int] = []

    def encode(text: str) -> list[int]:
        seen.append(len(text))
        return [len(word) for word in text.split()]

    assert len(_first_tokens(encode, "word " * 10**6, 100)) == 100
    assert max(seen) < 10_000


def test_no_code_and_no_other_file_is_reached_from_a_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of classes and files in the configs, by which transformers would run or read what they name."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('ran')\nclass Evil: pass\n", encoding="utf-8")
    code = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    outside = tmp_path / "outside.json"
    outside.write_text("{", encoding="utf-8")
    for name, more in (
        ("config.json", {"auto_map": code, "configuration_files": ["config.9.json"]}),
        ("tokenizer_config.json", {"auto_map": code, "fast_tokenizer_files": ["../outside.json"], "tokenizer_class": "Evil"}),
    ):
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**values, **more}), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    model = inspect_model(folder)
    texts = [Text(name="a", documents=("some words of a text " * 40,))]
    assert (tokenize(model, texts, 64, 32).tokens == tokenize(inspect_model(MODEL), texts, 64, 32).tokens).all()
    LayerStream(model).load_layer(0)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda v: v.update(model={"type": "BPE"}),
        lambda v: v.update(pre_tokenizer={"type": "Nothing"}),
        lambda v: v.update(added_tokens=[{"id": -1}]),
        lambda v: v.clear(),
    ],
    ids=["model", "pre-tokenizer", "added", "empty"],
)
def test_a_tokenizer_that_does_not_load_is_named(tmp_path: Path, spoil: object) -> None:
    values = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    spoil(values)  # type: ignore[operator]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer\.json: does not load") as caught:
        load_tokenizer(tmp_path, special=True)
    assert caught.value.exit_code == 4
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path, special=True)
