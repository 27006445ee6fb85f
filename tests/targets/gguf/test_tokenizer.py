"""The tokenizer of a checkpoint becomes GGUF keys with which llama.cpp makes the same ids; what it cannot do is refused by name."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import ROOT

from edgemoe.base.errors import ModelError, VerifyError
from edgemoe.targets.gguf import vocabulary_bpe
from edgemoe.targets.gguf.vocabulary import Vocabulary, add_vocabulary, check_vocabulary, read_vocabulary
from edgemoe.targets.gguf.vocabulary_bpe import TABLE, PreTokenizer

pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")

TINY = ROOT / "examples" / "tiny-moe"
HELDOUT = ROOT / "edgemoe" / "stream" / "data" / "heldout"
SIZE = 2000
SPM_SIZE = 600
TEXTS = [
    "The quick brown fox doesn't jump; it's I'LL we've THEY'RE over 12 lazy dogs.",
    "Straßenbahnhaltestellen, Übergrößenträger und 1.234,56 Euro für Müller & Söhne",
    "def f(x: int) -> list[int]:\n    return [i**2 for i in range(x) if i % 3 == 0]  # ok\n",
    "3.14159 42 007 1234567890 2026-01-31 0xDEADBEEF ½ ٣٤٥",
    "🚀😶‍🌫️ emoji 👍🏽, 日本語テキスト, русский язык, ελληνικά, 한국어",
    " leading", "  two", "trailing  ", "\t\ttabs\tand   runs    of     blanks\n\n\n  \r\n end", "a\n", "\n", " ", "",
    "!!!??? ...--- ((([[[ {}} /// \\\\ ''' \"\"\" @#$%^&*~`",
    "http://example.org/a_b-c?d=e&f=%20#g",
]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- helpers
def heldout_lines(n: int) -> list[str]:
    """Lines from every held-out text."""
    files = sorted(HELDOUT.glob("*.txt"))
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines()[: n // len(files)]]


def training_lines() -> list[str]:
    return heldout_lines(600) + TEXTS * 3


def save_vocabulary(path: Path, vocabulary: Vocabulary) -> Path:
    """A GGUF that holds nothing but a vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    add_vocabulary(writer, vocabulary, arch_vocab_key=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def differing(folder: Path, vocab_size: int, lines: list[str]) -> list[str]:
    """Lines that llama.cpp tokenizes otherwise, by the whole way: folder, GGUF, llama.cpp."""
    return check_vocabulary(save_vocabulary(folder / "vocabulary.gguf", read_vocabulary(folder, vocab_size)), folder, lines)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def pre_tokenizer_of(row: PreTokenizer) -> dict[str, Any]:
    """The steps of a table row, as tokenizer.json spells them."""
    nodes: list[dict[str, Any]] = []
    for kind, text in row.steps:
        if kind == "split":
            nodes.append({"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False})
        elif kind == "digits":
            nodes.append({"type": "Digits", "individual_digits": True})
        else:
            nodes.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": text == "gpt2"})
    return {"type": "Sequence", "pretokenizers": nodes} if len(nodes) > 1 else nodes[0]


@functools.cache
def trained(*, digits: bool) -> str:
    """A byte-level BPE trained without any pre-tokenizer: its merges reach over words, so that only the pre-tokenizer keeps words apart."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = level if digits else pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 20,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=level.alphabet(),
        show_progress=False,
        max_token_length=12,
    )
    tokenizer.train_from_iterator(heldout_lines(200) + TEXTS * 40, trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    return str(tokenizer.to_str())


def train_bpe(folder: Path, row: PreTokenizer) -> Path:
    """A byte-level BPE with one row's pre-tokenizer, in a folder as transformers would save it."""
    value = json.loads(trained(digits=row.name != "deepseek-llm"))
    value["pre_tokenizer"] = pre_tokenizer_of(row)
    value["normalizer"] = {"type": "NFC"} if row.nfc else None
    value["model"]["ignore_merges"] = row.ignore_merges
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer.json", value)
    bos = None if row.has_bos is False else "<|begin|>"
    write_json(folder / "tokenizer_config.json", {"bos_token": bos, "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"})
    return folder


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen2-like tokenizer; tests that change it copy it first."""
    return train_bpe(tmp_path_factory.mktemp("bpe"), TABLE[0])


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model like Mixtral's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spm")
    (folder / "lines.txt").write_text("\n".join(line for line in training_lines() if line.strip()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=SPM_SIZE,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    return folder


def convert_spm(folder: Path) -> dict[str, Any]:
    """The tokenizer.json that transformers makes of a tokenizer.model: every split of every piece is a merge, best pieces first."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {model.id_to_piece(i): i for i in range(len(model))}
    merges = []
    for text, i in vocab.items():
        if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i)):
            splits = [(text[:k], text[k:]) for k in range(1, len(text)) if text[:k] in vocab and text[k:] in vocab]
            merges += [(-model.get_score(i), -len(left), left, right) for left, right in splits]
    names = ("<unk>", "<s>", "</s>")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    blank, replace = {"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[name], "content": name, **plain} for name in names],
        "normalizer": {"type": "Sequence", "normalizers": [blank, replace]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "pair": [],
                           "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": None,
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocab,
                  "merges": [[left, right] for _, _, left, right in sorted(merges)]},
    }  # fmt: skip


@pytest.fixture(scope="module")
def spm_json(spm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spm_json")
    write_json(folder / "tokenizer.json", convert_spm(spm))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    return folder


Change = Callable[[dict[str, Any]], object]


def changed(source: Path, folder: Path, change: Change, name: str = "tokenizer.json") -> Path:
    """A copy of a tokenizer folder with one of its JSON files changed."""
    for file in source.glob("tokenizer*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    value = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else {}
    change(value)
    write_json(folder / name, value)
    return folder


# ---------------------------------------------------------------------------------------------------------------- parity
def test_shipped_model_tokenizes_heldout_text_as_the_original(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(TINY, 4096)
    assert (vocabulary.model, vocabulary.pre, len(vocabulary.tokens)) == ("gpt2", "qwen2", 4096)
    lines = heldout_lines(200)
    assert len(lines) == 200
    assert check_vocabulary(save_vocabulary(tmp_path / "v.gguf", vocabulary), TINY, lines) == []


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_known_pre_tokenizer_is_found_by_its_steps_and_tokenizes_alike(row: PreTokenizer, tmp_path: Path) -> None:
    folder = train_bpe(tmp_path, row)
    assert read_vocabulary(folder, SIZE).pre == row.name
    assert differing(folder, SIZE, TEXTS + heldout_lines(50)) == []


def test_wrong_pre_tokenizer_is_seen_by_the_check(bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = PreTokenizer("gpt-2", TABLE[0].steps)
    monkeypatch.setattr(vocabulary_bpe, "TABLE", (wrong,))
    found = read_vocabulary(bpe, SIZE)
    assert found.pre == "gpt-2"
    bad = check_vocabulary(save_vocabulary(tmp_path / "v.gguf", found), bpe, TEXTS)
    assert TEXTS[3] in bad
    assert "" not in bad


def test_regex_that_removes_the_rest_is_the_same_as_one_that_isolates(bpe: Path, tmp_path: Path) -> None:
    def invert(value: dict[str, Any]) -> None:
        value["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed", invert=True)

    folder = changed(bpe, tmp_path, invert)
    assert read_vocabulary(folder, SIZE).pre == "qwen2"
    assert differing(folder, SIZE, TEXTS) == []


def test_merges_as_strings_and_as_lists_are_the_same(bpe: Path, tmp_path: Path) -> None:
    def join(value: dict[str, Any]) -> None:
        value["model"]["merges"] = [" ".join(pair) for pair in value["model"]["merges"]]

    assert read_vocabulary(changed(bpe, tmp_path, join), SIZE) == read_vocabulary(bpe, SIZE)


def test_sentencepiece_model_tokenizes_alike(spm: Path) -> None:
    vocabulary = read_vocabulary(spm, SPM_SIZE + 5)
    assert (vocabulary.model, vocabulary.pre, vocabulary.add_bos_token, vocabulary.add_space_prefix) == ("llama", "default", True, True)
    assert (vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (0, 1, 2, None)
    assert vocabulary.types[:4] == (2, 3, 3, 6)
    assert differing(spm, SPM_SIZE + 5, TEXTS + heldout_lines(50)) == []


def test_tokenizer_json_of_a_sentencepiece_model_tokenizes_alike(spm_json: Path) -> None:
    vocabulary = read_vocabulary(spm_json, SPM_SIZE)
    assert (vocabulary.model, vocabulary.add_bos_token, vocabulary.types[:4]) == ("llama", True, (2, 3, 3, 6))
    assert differing(spm_json, SPM_SIZE, TEXTS + heldout_lines(50)) == []


def test_sentencepiece_model_and_its_tokenizer_json_together_tokenize_alike(spm: Path, spm_json: Path, tmp_path: Path) -> None:
    folder = changed(spm_json, tmp_path, lambda value: None)
    shutil.copy(spm / "tokenizer.model", folder)
    assert read_vocabulary(folder, SPM_SIZE).scores == read_vocabulary(spm, SPM_SIZE).scores
    assert differing(folder, SPM_SIZE, TEXTS) == []


def test_metaspace_that_keeps_the_text_whole_is_the_same_but_before_a_blank(spm_json: Path, tmp_path: Path) -> None:
    def use_metaspace(value: dict[str, Any]) -> None:
        value["normalizer"] = None
        value["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}

    folder = changed(spm_json, tmp_path, use_metaspace)
    assert differing(folder, SPM_SIZE, TEXTS) == [line for line in TEXTS if line.startswith(" ")]


# ------------------------------------------------------------------------------------------------------ what a GGUF says
def test_rows_without_token_are_padded_as_unused(bpe: Path) -> None:
    vocabulary = read_vocabulary(bpe, SIZE)
    used = SIZE - 18  # trained tokens and the two that were added
    assert vocabulary.tokens[used:] == tuple(f"[PAD{i}]" for i in range(used, SIZE))
    assert set(vocabulary.types[used:]) == {5}
    assert len(vocabulary.types) == SIZE


def test_added_tokens_are_control_when_special_and_user_defined_when_not(bpe: Path) -> None:
    vocabulary = read_vocabulary(bpe, SIZE)
    types = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert (types["<|begin|>"], types["<think>"], types["a"]) == (3, 4, 1)


def test_text_of_added_tokens_is_cut_out_of_lines_alike(bpe: Path) -> None:
    assert differing(bpe, SIZE, ["so <think>hm 12</think> yes", "a<|end|>b"]) == []


def test_folder_without_tokenizer_gives_a_gguf_for_token_ids(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"eos_token_id": 2})
    vocabulary = read_vocabulary(tmp_path, 32)
    assert (vocabulary.model, len(vocabulary.tokens), vocabulary.eos_id) == ("none", 32, None)
    reader = gguf.GGUFReader(save_vocabulary(tmp_path / "v.gguf", vocabulary))
    assert reader.get_field("tokenizer.ggml.model").contents() == "none"
    assert reader.get_field("llama.vocab_size").contents() == 32
    assert reader.get_field("tokenizer.ggml.tokens") is None


def test_special_ids_come_from_names_then_from_configs(bpe: Path, tmp_path: Path) -> None:
    folder = changed(bpe, tmp_path, lambda value: value.update(bos_token=None), "tokenizer_config.json")
    write_json(folder / "special_tokens_map.json", {"unk_token": {"content": "<think>"}})
    write_json(folder / "config.json", {"bos_token_id": 0, "eos_token_id": 5, "pad_token_id": -1})
    found = read_vocabulary(folder, SIZE)
    assert (found.bos_id, found.eos_id, found.unk_id, found.pad_id) == (0, 1, SIZE - 20, None)
    assert not found.add_bos_token


def test_further_ends_of_text_are_written_when_llama_cpp_would_not_know_them(bpe: Path, tmp_path: Path) -> None:
    folder = changed(bpe, tmp_path, lambda value: value["added_tokens"].append({"id": 1990, "content": "<|im_end|>", "special": True}))
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 1990, 1980, 1981]})
    found = read_vocabulary(folder, SIZE)
    assert (found.eos_id, found.eot_id, found.eom_id) == (1, 1980, 1981)


def test_bos_is_added_when_the_post_processor_does_or_the_config_says(bpe: Path, tmp_path: Path) -> None:
    parts = [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": parts, "pair": [], "special_tokens": {}}
    folder = changed(bpe, tmp_path, lambda value: value.update(post_processor={"type": "Sequence", "processors": [template]}))
    found = read_vocabulary(folder, SIZE)
    assert (found.add_bos_token, found.add_eos_token) == (True, False)
    write_json(folder / "tokenizer_config.json", {"bos_token": "<|begin|>", "eos_token": "<|end|>", "add_bos_token": False})
    assert not read_vocabulary(folder, SIZE).add_bos_token


def test_chat_template_comes_from_its_file_or_the_config(bpe: Path, tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    folder = changed(bpe, tmp_path, lambda value: value.update(chat_template=named), "tokenizer_config.json")
    assert read_vocabulary(folder, SIZE).chat_template == "D"
    (folder / "chat_template.jinja").write_text("J {{ x }}", encoding="utf-8")
    assert read_vocabulary(folder, SIZE).chat_template == "J {{ x }}"


def test_missing_bos_is_left_unset_where_llama_cpp_can(tmp_path: Path) -> None:
    row = next(row for row in TABLE if row.name == "glm4")
    folder = train_bpe(tmp_path, row)
    assert read_vocabulary(folder, SIZE).bos_id is None
    write_json(folder / "config.json", {"bos_token_id": 0})
    assert read_vocabulary(folder, SIZE).pre == "llama-bpe"


def test_ignore_merges_may_differ_while_it_changes_nothing(bpe: Path, tmp_path: Path) -> None:
    folder = changed(bpe, tmp_path, lambda value: value["model"].update(ignore_merges=True))
    assert read_vocabulary(folder, SIZE).pre == "qwen2"
    assert differing(folder, SIZE, TEXTS) == []
    folder = changed(folder, tmp_path, lambda value: value["model"]["merges"].pop())
    with pytest.raises(ModelError, match=r"model\.ignore_merges.*changes 1 token"):
        read_vocabulary(folder, SIZE)


def test_ids_that_added_tokens_leave_out_are_unused(bpe: Path, tmp_path: Path) -> None:
    folder = changed(bpe, tmp_path, lambda value: value["added_tokens"].append({"id": 1990, "content": "<x>", "special": True}))
    found = read_vocabulary(folder, SIZE)
    assert (found.tokens[1989], found.tokens[1990], found.types[1989], found.types[1990]) == ("[PAD1989]", "<x>", 5, 3)


def test_same_folder_gives_the_same_bytes(bpe: Path, tmp_path: Path) -> None:
    first = save_vocabulary(tmp_path / "a.gguf", read_vocabulary(bpe, SIZE)).read_bytes()
    assert save_vocabulary(tmp_path / "b.gguf", read_vocabulary(bpe, SIZE)).read_bytes() == first


# ------------------------------------------------------------------------------------------------------------- refusals
def put(path: str, value: Any) -> Change:
    """Set one field, given as a.b.0.c, to a value."""

    def change(tree: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        node: Any = tree
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[int(last) if isinstance(node, list) else last] = value

    return change


SPLIT = "pre_tokenizer.pretokenizers.0"
BAD_BPE = [
    (put("model", None), "model should be dict"),
    (put("model.type", "Unigram"), r"model\.type is 'Unigram'"),
    (put("model.vocab", ["a"]), r"model\.vocab should be dict"),
    (put("model.vocab.a", "1"), r"model\.vocab: the id of 'a' should be int"),
    (put("model.vocab.a", True), r"model\.vocab: the id of 'a' should be int"),
    (put("model.vocab.a", -1), r"'a' has id -1, but the model's embedding has 2000 rows"),
    (put("model.vocab.a", 10**30), r"'a' has id 10+, but"),
    (put("model.vocab.a", 3), "id 3 is both|has the ids"),
    (put("model.vocab.new", 1999), r"model\.vocab has no token with id 1982"),
    (put("model.vocab.bad\0", 1982), "which a GGUF cannot hold"),
    (put("model.vocab.\ud800", 1982), "which a GGUF cannot hold"),
    (put("model.merges", None), r"model\.merges should be list"),
    (put("model.merges", []), r"model\.merges is empty"),
    (put("model.merges.0", ["a"]), r"model\.merges\[0\] is .*not a pair"),
    (put("model.merges.0", [1, 2]), r"model\.merges\[0\] is .*not a pair"),
    (put("model.merges.0", 7), r"model\.merges\[0\] should be list"),
    (put("model.merges.0", ["a", "\u00e9\u00e9"]), r"model\.merges\[0\] needs the token"),
    (lambda value: value["model"]["merges"].append(value["model"]["merges"][0]), r"model\.merges\[\d+\] lists .* again"),
    (put("model.dropout", 0.1), r"model\.dropout"),
    (put("model.end_of_word_suffix", "</w>"), r"model\.end_of_word_suffix"),
    (put("model.byte_fallback", True), r"model\.byte_fallback should be false"),
    (put("normalizer", {"type": "Lowercase"}), "normalizer 'Lowercase'"),
    (put("normalizer", "NFC"), "normalizer should be dict"),
    (put(f"{SPLIT}.pattern", {"Regex": r"\w+|\W+"}), "pre_tokenizer is none that edgemoe knows"),
    (put(f"{SPLIT}.pattern", {"String": " "}), "pre_tokenizer is none"),
    (put(f"{SPLIT}.behavior", "Removed"), "pre_tokenizer is none"),
    (put("pre_tokenizer.pretokenizers.1.add_prefix_space", True), "pre_tokenizer is none"),
    (put("pre_tokenizer.pretokenizers", "x"), r"pre_tokenizer\.pretokenizers should be list"),
    (put("pre_tokenizer.pretokenizers.0", 3), r"pre_tokenizer\.pretokenizers should be dict"),
    (put("pre_tokenizer", None), "byte_fallback should be true"),
    (put("added_tokens", {"0": "a"}), "added_tokens should be list"),
    (put("added_tokens.0", 4), r"added_tokens\[0\] should be dict"),
    (put("added_tokens.0.id", 2000), "embedding has 2000 rows"),
    (put("added_tokens.0.id", "0"), r"added_tokens\[0\]\.id should be int"),
    (put("added_tokens.0.content", None), r"added_tokens\[0\]\.content should be str"),
    (put("added_tokens.0.id", 5), "has the ids"),
    (put("added_tokens.2.lstrip", True), r"added_tokens\[2\]\.lstrip is true"),
    (put("added_tokens.2.content", "[PAD1990]"), r"padding: '\[PAD1990\]' has the ids"),
]


@pytest.mark.parametrize(("change", "words"), BAD_BPE, ids=[words[:40] for _, words in BAD_BPE])
def test_bad_tokenizer_json_is_refused_by_file_and_field(change: Change, words: str, bpe: Path, tmp_path: Path) -> None:
    folder = changed(bpe, tmp_path, change)
    with pytest.raises(ModelError, match=words) as caught:
        read_vocabulary(folder, SIZE)
    assert "tokenizer.json" in str(caught.value)
    assert caught.value.exit_code == 4


def part_splits(value: dict[str, Any]) -> None:
    """Move one of the splits of a token to the end."""
    merges = value["model"]["merges"]
    texts = ["".join(pair) for pair in merges]
    merges.append(merges.pop(next(i for i, text in enumerate(texts[:-1]) if text == texts[i + 1])))


BAD_SPM_JSON = [
    (put("model.byte_fallback", False), r"model\.byte_fallback should be true"),
    (put("model.ignore_merges", True), r"model\.ignore_merges"),
    (lambda value: value["model"]["merges"].pop(0), r"model\.merges lacks"),
    (part_splits, r"model\.merges lists the splits of .* apart"),
    (
        lambda value: value["model"]["vocab"].update({"<byte>": value["model"]["vocab"].pop("<0x41>")}),
        "1 of the 256 byte tokens are missing",
    ),
    (put("normalizer", {"type": "NFKC"}), "normalizer 'NFKC'"),
    (put("normalizer", None), "leave blanks as they are"),
    (put("pre_tokenizer", {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}), "it cuts the text"),
    (put("pre_tokenizer", {"type": "Whitespace"}), "pre_tokenizer 'Whitespace'"),
    (put("post_processor.single", 3), r"post_processor\.single should be list"),
]


@pytest.mark.parametrize(("change", "words"), BAD_SPM_JSON, ids=[words[:40] for _, words in BAD_SPM_JSON])
def test_tokenizer_json_that_sentencepiece_could_not_have_made_is_refused(
    change: Change, words: str, spm_json: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        read_vocabulary(changed(spm_json, tmp_path, change), SPM_SIZE)


BAD_CONFIGS = [
    ("tokenizer_config.json", {"eos_token": 3}, "eos_token should be str"),
    ("tokenizer_config.json", {"eos_token": {"content": 3}}, "eos_token should be str"),
    ("tokenizer_config.json", {"eos_token": None}, "no eos_token in tokenizer_config.json"),
    ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos_token should be bool"),
    ("tokenizer_config.json", {"bos_token": None, "add_bos_token": True}, "add_bos_token is true, but there is no bos_token"),
    ("tokenizer_config.json", {"chat_template": 3}, "chat_template should be str"),
    ("special_tokens_map.json", {"unk_token": []}, "unk_token should be str"),
    ("config.json", {"eos_token_id": 2000}, r"config\.json: eos_token_id is 2000, but the vocabulary has 2000 tokens"),
    ("generation_config.json", {"eos_token_id": [1, "2"]}, r"generation_config\.json: eos_token_id should be int"),
    ("generation_config.json", {"eos_token_id": [1, 10**12]}, "eos_token_id is 1000000000000"),
]


@pytest.mark.parametrize(("name", "values", "words"), BAD_CONFIGS, ids=[words[:40] for _, _, words in BAD_CONFIGS])
def test_bad_config_is_refused_by_file_and_field(name: str, values: dict[str, Any], words: str, bpe: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        read_vocabulary(changed(bpe, tmp_path, lambda value: value.update(values), name), SIZE)


def test_deeply_nested_steps_are_refused(bpe: Path, tmp_path: Path) -> None:
    node: dict[str, Any] = {"type": "NFC"}
    for _ in range(300):
        node = {"type": "Sequence", "normalizers": [node]}
    with pytest.raises(ModelError, match="normalizer is nested more than 8 deep"):
        read_vocabulary(changed(bpe, tmp_path, lambda value: value.update(normalizer=node)), SIZE)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}'])
def test_files_that_are_no_json_object_are_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(raw)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        read_vocabulary(tmp_path, SIZE)


def test_more_tokens_than_rows_are_refused(bpe: Path) -> None:
    with pytest.raises(ModelError, match="the model's embedding has 100 rows"):
        read_vocabulary(bpe, 100)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(name: str, bpe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bpe, folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=f"{name}: not a regular file"):
        read_vocabulary(folder, SIZE)


def test_huge_tokenizer_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**40)
        with pytest.raises(ModelError, match=r"1099511627776 bytes is too large"):
            read_vocabulary(tmp_path, SIZE)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer_config.json", "tiktoken.model"])
def test_folder_that_lost_its_tokenizer_json_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=f"{name} is there, but neither"):
        read_vocabulary(tmp_path, SIZE)


def test_special_ids_of_a_tokenizer_model_must_be_pieces(spm: Path, tmp_path: Path) -> None:
    tail = bytes([0x12, 4, 0x18, 2, 0xC8, 0x02]) + b"\x7f"  # another trainer_spec: model_type 2, bos_id (field 41) 127, cut short
    for spec, words in (
        (tail, "not a SentencePiece model"),
        (b"\x12\x06\x18\x02\xc8\x02\xff\x7f", "bos_id is 16383, but there are 600 pieces"),
    ):
        (tmp_path / "tokenizer.model").write_bytes((spm / "tokenizer.model").read_bytes() + spec)
        with pytest.raises(ModelError, match=words):
            read_vocabulary(tmp_path, SPM_SIZE)


def test_unigram_model_is_refused(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "lines.txt").write_text("\n".join(line for line in heldout_lines(100) if line.strip()), encoding="utf-8")
    options = {"model_type": "unigram", "vocab_size": 300, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "lines.txt"), model_prefix=str(tmp_path / "tokenizer"), **options)
    with pytest.raises(ModelError, match=r"tokenizer\.model: trainer_spec\.model_type is 1"):
        read_vocabulary(tmp_path, SIZE)


def test_tokenizer_json_beside_another_tokenizer_model_is_refused(spm: Path, spm_json: Path, tmp_path: Path) -> None:
    def swap(value: dict[str, Any]) -> None:
        vocab = value["model"]["vocab"]
        vocab["e"], vocab["t"] = vocab["t"], vocab["e"]

    folder = changed(spm_json, tmp_path, swap)
    shutil.copy(spm / "tokenizer.model", folder)
    with pytest.raises(ModelError, match=r"model\.vocab has 'e' as \d+, tokenizer\.model as"):
        read_vocabulary(folder, SPM_SIZE)


def test_no_damage_to_a_tokenizer_json_is_more_than_a_model_error(bpe: Path, spm_json: Path, tmp_path: Path) -> None:
    junk: list[Any] = [None, True, -1, 10**20, math.inf, "", "x" * 50, "\0", [], [[]], {}, {"type": "Sequence"}, {"id": {}}]
    rng = random.Random(0)
    for source in (bpe, spm_json):
        whole = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
        for _ in range(150):
            tree: Any = {
                **whole,
                "model": {**whole["model"], "vocab": dict(whole["model"]["vocab"]), "merges": list(whole["model"]["merges"])},
            }
            for name in ("added_tokens", "pre_tokenizer", "normalizer", "post_processor"):
                tree[name] = copy.deepcopy(whole[name])
            node = tree
            while True:
                key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
                if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.3:
                    break
                node = node[key]
            node[key] = rng.choice(junk)
            write_json(tmp_path / "tokenizer.json", tree)
            write_json(tmp_path / "config.json", {"eos_token_id": 2})
            try:
                assert len(read_vocabulary(tmp_path, SIZE).tokens) == SIZE
            except ModelError as error:
                assert "tokenizer.json" in str(error)


def test_no_damage_to_a_config_is_more_than_a_model_error(bpe: Path, tmp_path: Path) -> None:
    junk: list[Any] = [
        None,
        True,
        -1,
        10**20,
        math.inf,
        "",
        "<think>",
        [],
        [[]],
        [{}],
        [{"name": []}],
        {},
        {"content": 3},
        {"content": "a"},
    ]
    keys = [f"{kind}_token{end}" for kind in ("bos", "eos", "unk", "pad") for end in ("", "_id")]
    rng = random.Random(0)
    for _ in range(300):
        name = rng.choice(["tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json"])
        value = {key: rng.choice(junk) for key in rng.sample([*keys, "add_bos_token", "add_eos_token", "chat_template"], 4)}
        folder = changed(bpe, tmp_path, value.update, name)
        write_json(folder / name, {"bos_token": "<|begin|>", "eos_token": "<|end|>", **value})
        try:
            found = read_vocabulary(folder, SIZE)
            assert all(i is None or 0 <= i < SIZE for i in (found.bos_id, found.eos_id, found.eot_id, found.unk_id, found.pad_id))
        except ModelError as error:
            assert str(tmp_path) in str(error)
        (folder / name).unlink()


def test_no_damage_to_a_tokenizer_model_is_more_than_a_model_error(spm: Path, tmp_path: Path) -> None:
    whole = (spm / "tokenizer.model").read_bytes()
    rng = random.Random(0)
    for trial in range(200):
        raw = bytearray(whole if trial % 2 else whole[: rng.randrange(len(whole))])
        for _ in range(trial % 4):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(raw)
        try:
            assert len(read_vocabulary(tmp_path, SPM_SIZE).tokens) == SPM_SIZE
        except ModelError as error:
            assert str(tmp_path) in str(error)


# --------------------------------------------------------------------------------------------------------- check_vocabulary
def test_check_says_why_llama_cpp_does_not_load(bpe: Path, tmp_path: Path) -> None:
    path = save_vocabulary(tmp_path / "v.gguf", read_vocabulary(bpe, SIZE))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(VerifyError, match=r"v\.gguf: llama\.cpp stopped .*: .+"):
        check_vocabulary(path, bpe, ["a"])


def test_check_survives_a_crash_of_llama_cpp(bpe: Path, tmp_path: Path) -> None:
    found = read_vocabulary(bpe, SIZE)
    tokens = (*found.tokens[:-1], found.tokens[-2])  # two tokens with one text, which llama.cpp answers with SIGABRT
    values = {name: getattr(found, name) for name in Vocabulary.__dataclass_fields__}
    path = save_vocabulary(tmp_path / "v.gguf", Vocabulary(**{**values, "tokens": tokens}))
    with pytest.raises(VerifyError, match=r"exit status -6.*GGML_ASSERT"):
        check_vocabulary(path, bpe, ["a"])


def test_check_needs_a_tokenizer_to_compare_with(bpe: Path, tmp_path: Path) -> None:
    path = save_vocabulary(tmp_path / "v.gguf", read_vocabulary(bpe, SIZE))
    with pytest.raises(ModelError, match="neither tokenizer"):
        check_vocabulary(path, tmp_path, ["a"])
    (tmp_path / "tokenizer.json").write_text('{"model": 3}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer\.json: does not load"):
        check_vocabulary(path, tmp_path, ["a"])
