"""This module turns the tokenizer of a checkpoint folder into the `tokenizer.ggml.*` keys of a GGUF.

Byte-level BPE becomes llama.cpp's "gpt2" (vocabulary_bpe.py), SentencePiece BPE becomes "llama" (vocabulary_spm.py), and a checkpoint
without a tokenizer becomes "none".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgemoe.base.errors import ModelError
from edgemoe.base.storage import read_json, regular_size
from edgemoe.model.tokenizer import MAX_TOKENIZER
from edgemoe.targets.gguf import vocabulary_bpe, vocabulary_spm
from edgemoe.targets.gguf.vocabulary_check import check_vocabulary
from edgemoe.targets.tokenizer.tokens import TokenList, expect, flatten, list_added, read_added

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["Vocabulary", "add_vocabulary", "check_vocabulary", "read_vocabulary"]

MAX_TEMPLATE = 2**20
# Tokenizers that transformers can load but that have to become a tokenizer.json first.
_OTHER_FILES = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tiktoken.model", "tekken.json", "qwen.tiktoken")
# Texts that llama.cpp takes for an end of generation by itself (src/llama-vocab.cpp, "maintain a list of tokens").
# fmt: off
_KNOWN_ENDS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>",
    "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>",
    "<|tool_response>", "[e~[", "<\uff5cend\u2581of\u2581sentence\uff5c>",
))
# fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The tokenizer of a GGUF; `tokens` has as many entries as the embedding has rows."""

    model: Literal["gpt2", "llama", "none"]
    pre: str = ""  # llama.cpp's name of the pre-tokenizer
    tokens: tuple[str, ...]
    types: tuple[int, ...]  # llama.h: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte
    scores: tuple[float, ...] = ()  # "llama" only
    merges: tuple[str, ...] = ()  # "gpt2" only
    bos_id: int | None = None
    eos_id: int | None = None
    eot_id: int | None = None  # further ids that end a text, if llama.cpp does not know them by their names
    eom_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    add_bos_token: bool = False
    add_eos_token: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of a folder that describe its tokenizer; a missing config is empty."""

    folder: Path
    json_file: Path
    model_file: Path
    tokenizer: dict[str, Any] | None  # tokenizer.json
    config: dict[str, Any]
    generation: dict[str, Any]
    tokenizer_config: dict[str, Any]
    special: dict[str, Any]


def _open_files(folder: Path) -> _Files:
    def read(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).exists() else {}

    json_file = folder / "tokenizer.json"
    return _Files(
        folder=folder,
        json_file=json_file,
        model_file=folder / "tokenizer.model",
        tokenizer=read_json(json_file, MAX_TOKENIZER) if json_file.exists() else None,
        config=read("config.json"),
        generation=read("generation_config.json"),
        tokenizer_config=read("tokenizer_config.json"),
        special=read("special_tokens_map.json"),
    )


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """The tokenizer of a checkpoint, as llama.cpp needs it.

    Args:
        folder: with tokenizer.json or tokenizer.model, and the configs.  Without any tokenizer the GGUF can only take token ids.
        vocab_size: rows of the embedding.

    Raises:
        ModelError: a file is malformed, or needs a feature that llama.cpp lacks; the message names the file and the field.
    """
    files = _open_files(folder)
    bpe = files.tokenizer is not None and vocabulary_bpe.is_byte_level(files.json_file, files.tokenizer)
    tokens = TokenList(files.json_file if files.tokenizer is not None else files.model_file, vocab_size)
    if files.tokenizer is None and not files.model_file.exists():
        _refuse_other_tokenizers(folder)
        return Vocabulary(model="none", tokens=tokens.finish(), types=tuple(tokens.types))
    merges: tuple[str, ...] = ()
    pre, prefix, spare = "default", False, dict[str, int | None]()
    if bpe and files.tokenizer is not None:
        has_bos = (_find_name(files, "bos") or _find_id(files, "bos")) is not None
        pre, merges = vocabulary_bpe.read_byte_level(files.json_file, files.tokenizer, tokens, has_bos=has_bos)
    else:
        prefix, spare = _read_spm(files, tokens)
    ids = _find_ids(files, tokens, spare)
    texts = tokens.finish(min(tokens.scores) - 1.0)
    return Vocabulary(
        model="gpt2" if bpe else "llama",
        pre=pre,
        tokens=texts,
        types=tuple(tokens.types),
        scores=() if bpe else tuple(tokens.scores),
        merges=merges,
        add_bos_token=_is_added(files, "bos", ids["bos_id"], texts, 0),
        add_eos_token=_is_added(files, "eos", ids["eos_id"], texts, -1),
        add_space_prefix=prefix,
        chat_template=_read_template(files),
        **ids,
    )


def _refuse_other_tokenizers(folder: Path) -> None:
    names = [name for name in (*_OTHER_FILES, "tokenizer_config.json") if (folder / name).exists()]
    if names:
        raise ModelError(
            f"{folder}: {names[0]} is there, but neither tokenizer.json nor tokenizer.model",
            hint="finish the download, or let transformers write it: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )


def _read_spm(files: _Files, tokens: TokenList) -> tuple[bool, dict[str, int | None]]:
    """Fill the tokens of a SentencePiece family; tokenizer.model has the true scores, and transformers follows tokenizer.json."""
    if files.tokenizer is not None and not files.model_file.exists():
        vocabulary_spm.read_json_model(files.json_file, files.tokenizer, tokens)
        return vocabulary_spm.read_prefix(files.json_file, files.tokenizer), {}
    prefix, spare = vocabulary_spm.read_model(files.model_file, tokens)
    if files.tokenizer is not None:
        prefix = vocabulary_spm.read_prefix(files.json_file, files.tokenizer)
        vocabulary_spm.check_same(files.json_file, files.tokenizer, tokens)
        vocabulary_spm.put_added(tokens, list_added(files.json_file, files.tokenizer))
        return prefix, spare
    file = files.folder / "tokenizer_config.json"
    entries = expect(files.tokenizer_config.get("added_tokens_decoder") or {}, dict, file, "added_tokens_decoder")
    added = [
        read_added(file, f"added_tokens_decoder.{key}", entry, int(key) if key.isdecimal() and len(key) < 10 else None)
        for key, entry in entries.items()
    ]
    vocabulary_spm.put_added(tokens, added)
    asked = files.tokenizer_config.get("add_prefix_space")
    return prefix if asked is None else expect(asked, bool, file, "add_prefix_space"), spare


# ------------------------------------------------------------------------------------------------------- special tokens
def _find_name(files: _Files, kind: str) -> str | None:
    """The text of a special token by its role."""
    for name, values in (("tokenizer_config.json", files.tokenizer_config), ("special_tokens_map.json", files.special)):
        value = values.get(f"{kind}_token")
        if isinstance(value, dict):
            value = value.get("content")
        if value is not None:
            return expect(value, str, files.folder / name, f"{kind}_token")
    return None


def _list_ids(files: _Files, kind: str) -> list[tuple[int, str]]:
    """The ids that the model's configs give to a role, each with the name of the file; -1 stands for no id."""
    for name, values in (("generation_config.json", files.generation), ("config.json", files.config)):
        value = values.get(f"{kind}_token_id")
        if value is not None:
            file = files.folder / name
            found = [expect(entry, int, file, f"{kind}_token_id") for entry in (value if isinstance(value, list) else [value])]
            return [(token_id, name) for token_id in found if token_id >= 0]
    return []


def _find_id(files: _Files, kind: str) -> int | None:
    return next((token_id for token_id, _ in _list_ids(files, kind)), None)


def _find_ids(files: _Files, tokens: TokenList, spare: dict[str, int | None]) -> dict[str, int | None]:
    """Ids of the special tokens: by the tokenizer's names, else by the model's configs, else as in tokenizer.model.

    Raises:
        ModelError: an id out of range, or no end of text: llama.cpp would end at token 11, or 2.
    """
    ids: dict[str, int | None] = {}
    for kind in ("bos", "eos", "unk", "pad"):
        for token_id, name in _list_ids(files, kind):
            if token_id >= tokens.size:
                raise ModelError(f"{files.folder / name}: {kind}_token_id is {token_id}, but the vocabulary has {tokens.size} tokens")
        found = tokens.ids.get(_find_name(files, kind) or "")
        found = _find_id(files, kind) if found is None else found
        ids[f"{kind}_id"] = spare.get(kind) if found is None else found
    if ids["eos_id"] is None:
        raise ModelError(f"{files.folder}: no eos_token in tokenizer_config.json and no eos_token_id in config.json", hint="add one")
    more = [i for i, _ in _list_ids(files, "eos") if i != ids["eos_id"] and tokens.texts[i] not in _KNOWN_ENDS]
    ids["eot_id"], ids["eom_id"] = (*more, None, None)[:2]
    return ids


def _is_added(files: _Files, kind: str, token_id: int | None, texts: Sequence[str], place: int) -> bool:
    """Whether the tokenizer puts BOS before, or EOS after, the tokens of a text."""
    value = files.tokenizer_config.get(f"add_{kind}_token")
    file = files.folder / "tokenizer_config.json"
    if value is not None:
        added = expect(value, bool, file, f"add_{kind}_token")
    elif files.tokenizer is None:
        added = kind == "bos" and token_id is not None  # as LlamaTokenizer, the class of SentencePiece families, does
    else:
        added = False
        for step in flatten(files.json_file, "post_processor", files.tokenizer.get("post_processor"), "processors"):
            if step.get("type") == "TemplateProcessing":
                parts = expect(step.get("single"), list, files.json_file, "post_processor.single")
                part = parts[place].get("SpecialToken") if parts and isinstance(parts[place], dict) else None
                added = token_id is not None and isinstance(part, dict) and part.get("id") == texts[token_id]
    if added and token_id is None:
        raise ModelError(
            f"{file}: add_{kind}_token is true, but there is no {kind}_token", hint=f"add the {kind}_token, or set it to false"
        )
    return added


def _read_template(files: _Files) -> str | None:
    """The chat template: its own file, or the one in the config that is named default."""
    file = files.folder / "chat_template.jinja"
    if file.exists():
        try:
            if (size := regular_size(file)) > MAX_TEMPLATE:
                raise ModelError(f"{file}: {size} bytes is too large for a chat template")
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file}: cannot be read: {error}") from error
    value, file = files.tokenizer_config.get("chat_template"), files.folder / "tokenizer_config.json"
    if isinstance(value, list):
        entries = [expect(entry, dict, file, "chat_template[]") for entry in value]
        entries.sort(key=lambda entry: entry.get("name") != "default")  # the default, else the first
        value = entries[0].get("template") if entries else None
    return None if value is None else expect(value, str, file, "chat_template")


# --------------------------------------------------------------------------------------------------------------- writing
def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, arch_vocab_key: bool) -> None:
    """Write the `tokenizer.ggml.*` keys, always in the same order.

    Args:
        writer: of the GGUF, before its header is written.
        vocabulary: of `read_vocabulary`.
        arch_vocab_key: also write `{arch}.vocab_size`, which llama.cpp needs when there is no tokenizer.
    """
    if arch_vocab_key:
        writer.add_vocab_size(len(vocabulary.tokens))
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.model == "none":
        return
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for kind in ("bos", "eos", "eot", "eom", "unk", "pad"):
        token_id = getattr(vocabulary, f"{kind}_id")
        if token_id is not None:
            getattr(writer, f"add_{kind}_token_id")(token_id)
    writer.add_add_bos_token(vocabulary.add_bos_token)
    writer.add_add_eos_token(vocabulary.add_eos_token)
    if vocabulary.model == "llama":
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
