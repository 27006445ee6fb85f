"""This module reads tokens, merges and the name of llama.cpp's pre-tokenizer from the tokenizer.json of a byte-level BPE.

llama.cpp knows pre-tokenizers only by name (`tokenizer.ggml.pre`).  A wrong name loads and silently tokenizes otherwise, so the name is
looked up by the exact steps in the file, and steps that are not in the table are refused.
The source of names, regexes and flags is llama.cpp's src/llama-vocab.cpp as bundled with llama-cpp-python 0.3.36 (llm_tokenizer_bpe, load).
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemoe.base.errors import ModelError
from edgemoe.model.tokenizer import load_package
from edgemoe.targets.tokenizer.tokens import CONTROL, NORMAL, USER_DEFINED, AddedToken, TokenList, expect, flatten, list_added

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _BLANKS
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _BLANKS
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _BLANKS
_UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = f"{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _BLANKS
_O200K = f"{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_UPPER}+{_LOWER}*{_CONTRACTIONS}?" + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _BLANKS
_DEEPSEEK3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|"
    "\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386"
    "\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-"
    "\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-"
    "\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-"
    "\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0"
    "-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)

Step = tuple[str, str]  # ("split", regex), ("digits", "each"), ("bytes", "gpt2" with the regex of GPT-2, "plain" without)
_PLAIN: Step = ("bytes", "plain")
_GPT2: Step = ("bytes", "gpt2")


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One of llama.cpp's names, its steps, and the flags that it sets; None marks a flag that does not matter for this name."""

    name: str
    steps: tuple[Step, ...]
    ignore_merges: bool = False  # a word that is a token is not merged up from its bytes
    has_bos: bool | None = None  # "glm4" is the name that leaves the id of a missing BOS unset; others default to token 11
    nfc: bool | None = None


# Rows with the same steps and flags tokenize alike; the first that fits is taken.
TABLE = (
    PreTokenizer("qwen2", (("split", _QWEN2), _PLAIN)),
    PreTokenizer("qwen35", (("split", _QWEN35), _PLAIN)),
    PreTokenizer("glm4", (("split", _LLAMA3), _PLAIN), ignore_merges=True, has_bos=False),
    PreTokenizer("llama-bpe", (("split", _LLAMA3), _PLAIN), ignore_merges=True),
    PreTokenizer("dbrx", (("split", _LLAMA3), _PLAIN)),
    PreTokenizer("olmo", (_GPT2,), nfc=True),  # GPT-NeoX, OLMoE
    PreTokenizer("gpt-2", (_GPT2,)),
    PreTokenizer("starcoder", (("digits", "each"), _GPT2)),  # and SmolLM, Granite 3
    PreTokenizer("deepseek-v3", (("split", r"\p{N}{1,3}"), ("split", _CJK), ("split", _DEEPSEEK3), _PLAIN)),
    PreTokenizer(  # llama.cpp takes runs of digits where the file takes single ones: the same while no token has two digits
        "deepseek-llm",
        (
            ("split", "[\r\n]"),
            ("split", f"\\s?[{_DEEPSEEK_LETTERS}]+"),
            ("split", "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"),
            ("split", "\\s+$"),
            ("split", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
            ("digits", "each"),
            _PLAIN,
        ),
    ),
    PreTokenizer("gpt-4o", (("split", _O200K), _PLAIN)),  # and gpt-oss, Llama 4, MiniMax-M2
    PreTokenizer("tekken", (("split", _TEKKEN), _PLAIN), ignore_merges=True),
)


def is_byte_level(file: Path, tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json works on bytes, as GPT-2's does."""
    return any(step.get("type") == "ByteLevel" for step in flatten(file, "pre_tokenizer", tokenizer.get("pre_tokenizer"), "pretokenizers"))


def read_byte_level(file: Path, tokenizer: dict[str, Any], tokens: TokenList, *, has_bos: bool) -> tuple[str, tuple[str, ...]]:
    """Fill the tokens of a byte-level BPE.

    Returns:
        The pre-tokenizer's name and the merges, best first, each as "left right".

    Raises:
        ModelError: the file is malformed, or needs a feature that llama.cpp lacks.
    """
    model = expect(tokenizer.get("model"), dict, file, "model")
    check_model(file, model, byte_fallback=False)
    nfc = _check_normalizer(file, tokenizer)
    vocab = expect(model.get("vocab"), dict, file, "model.vocab")
    added = list_added(file, tokenizer)
    put_tokens(tokens, vocab, added)
    merges = read_merges(file, model, vocab)
    row = _find_row(file, tokenizer, has_bos=has_bos, nfc=nfc, ignore_merges=bool(model.get("ignore_merges")))
    if row.ignore_merges != bool(model.get("ignore_merges")):
        _check_flag_is_idle(file, vocab, merges, {token.text for token in added}, row.name)
    return row.name, tuple(f"{left} {right}" for left, right in merges)


def put_tokens(tokens: TokenList, vocab: dict[str, Any], added: list[AddedToken]) -> None:
    """Put the model's own tokens, whose ids have no gap, and the added tokens, whose ids may have gaps (those of cl100k have)."""
    for text, token_id in vocab.items():
        tokens.put(token_id, text, NORMAL, "model.vocab")
    for i, token in enumerate(added):
        tokens.put(token.token_id, token.text, CONTROL if token.special else USER_DEFINED, f"added_tokens[{i}]")
    own = set(vocab) - {token.text for token in added}
    tokens.check_no_gap(max((vocab[text] for text in own), default=-1), "model.vocab")


def check_model(file: Path, model: dict[str, Any], *, byte_fallback: bool) -> None:
    """Refuse every kind of model, and every option, for which llama.cpp has no counterpart."""
    kind = model.get("type", "BPE" if "merges" in model else None)  # the oldest files do not say
    if kind != "BPE":
        raise ModelError(f"{file}: model.type is {kind!r:.40}, only BPE is supported")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ModelError(f"{file}: model.{name} is {model[name]!r:.40}, which llama.cpp cannot do")
    if bool(model.get("byte_fallback")) != byte_fallback:
        raise ModelError(f"{file}: model.byte_fallback should be {str(byte_fallback).lower()} for this pre_tokenizer")


def read_merges(file: Path, model: dict[str, Any], vocab: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges as pairs; the file has them as "left right" or as [left, right]."""
    pairs: dict[tuple[str, str], None] = {}
    for i, entry in enumerate(expect(model.get("merges"), list, file, "model.merges")):
        parts = entry.split(" ") if isinstance(entry, str) else expect(entry, list, file, f"model.merges[{i}]")
        # llama.cpp splits at the blank, so a part cannot hold one.
        if len(parts) != 2 or not all(isinstance(part, str) and part and " " not in part for part in parts):
            raise ModelError(f"{file}: model.merges[{i}] is {entry!r:.80}, not a pair of tokens")
        left, right = parts
        for text in (left, right, left + right):
            if text not in vocab:
                raise ModelError(f"{file}: model.merges[{i}] needs the token {text!r:.40}, which model.vocab lacks")
        if (left, right) in pairs:
            raise ModelError(f"{file}: model.merges[{i}] lists {left!r:.40} {right!r:.40} again")
        pairs[left, right] = None
    if not pairs:
        raise ModelError(f"{file}: model.merges is empty, and llama.cpp does not load a BPE without merges")
    return list(pairs)


def _check_normalizer(file: Path, tokenizer: dict[str, Any]) -> bool:
    """Whether the text is first normalised to NFC.  llama.cpp has no NFC; text that is NFC already, as most is, tokenizes the same."""
    kinds = [step.get("type") for step in flatten(file, "normalizer", tokenizer.get("normalizer"), "normalizers")]
    for kind in kinds:
        if kind != "NFC":
            raise ModelError(f"{file}: normalizer {kind!r:.40} is not supported with a byte-level BPE", hint="llama.cpp cannot do it")
    return bool(kinds)


def _read_steps(file: Path, tokenizer: dict[str, Any]) -> tuple[Step, ...]:
    steps: list[Step] = []
    nodes = flatten(file, "pre_tokenizer", tokenizer.get("pre_tokenizer"), "pretokenizers")
    splits = sum(node.get("type") == "Split" for node in nodes)
    for node in nodes:
        kind, pattern = node.get("type"), node.get("pattern")
        if kind == "ByteLevel" and node.get("add_prefix_space") is False:
            steps.append(_PLAIN if node.get("use_regex", True) is False else _GPT2)
        elif kind == "Digits" and node.get("individual_digits") is True:
            steps.append(("digits", "each"))
        elif kind == "Split" and isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
            way = (node.get("behavior"), bool(node.get("invert")))
            # Keeping the matches and dropping the rest is the same when a regex, alone, matches every text to its end.
            whole = way == ("Removed", True) and splits == 1
            steps.append(("split" if whole or way == ("Isolated", False) else f"split {way}", _spell(pattern["Regex"])))
        else:
            steps.append((f"unknown {kind}", ""))
    return tuple(steps)


def _spell(regex: str) -> str:
    """One spelling: files differ in whether a class holds a newline or its escape, and editors normalise characters."""
    return unicodedata.normalize("NFC", regex).replace("\r", "\\r").replace("\n", "\\n")


def _find_row(file: Path, tokenizer: dict[str, Any], *, has_bos: bool, nfc: bool, ignore_merges: bool) -> PreTokenizer:
    steps = _read_steps(file, tokenizer)
    rows = [row for row in TABLE if tuple((kind, _spell(text)) for kind, text in row.steps) == steps]
    rows = [row for row in rows if row.has_bos in (None, has_bos) and row.nfc in (None, nfc)]
    if not rows:
        raise ModelError(
            f"{file}: pre_tokenizer is none that edgemoe knows: {' | '.join(f'{kind} {text}'.strip() for kind, text in steps)[:300]}",
            hint="known by their llama.cpp names: " + ", ".join(row.name for row in TABLE),
        )
    return next((row for row in rows if row.ignore_merges == ignore_merges), rows[0])


def _check_flag_is_idle(file: Path, vocab: dict[str, Any], merges: list[tuple[str, str]], added: set[str], name: str) -> None:
    """Let `ignore_merges` differ from what llama.cpp does under this name only if every token is what its own merges give."""
    bpe = load_package("tokenizers").models.BPE(vocab=vocab, merges=merges)
    lost = [text for text in vocab if text not in added and len(bpe.tokenize(text)) != 1]
    if lost:
        raise ModelError(f"{file}: model.ignore_merges is not what llama.cpp does for {name!r}, and changes {len(lost)} tokens: {lost[:3]}")
