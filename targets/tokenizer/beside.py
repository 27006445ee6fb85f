"""This module uses the tokenizer that lies in an artifact's folder, for runtimes that take tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from edgemoe.base.errors import MachineError, ModelError, VerifyError
from edgemoe.ir import Model
from edgemoe.model.tokenizer import load_package
from edgemoe.targets.gguf.vocabulary_check import tokenize_original


def check_tokenizer(path: Path, model: Model, lines: Sequence[str]) -> list[str]:
    """Lines that the tokenizer beside model.onnx tokenizes otherwise than the checkpoint's own.

    Raises:
        VerifyError: there is no tokenizer beside the model, or it does not load.
    """
    expected = tokenize_original(Path(model.folder), lines)
    try:
        ours = tokenize_original(artifact_folder(path), lines)
    except ModelError as error:
        raise VerifyError(str(error)) from error
    return [line for line, tokens, original in zip(lines, ours, expected, strict=True) if tokens != original]


def artifact_folder(path: Path) -> Path:
    """The folder of an artifact's small files: that of the model, or the folder above it (transformers.js' layout)."""
    return path.parent if (path.parent / "config.json").exists() else path.parent.parent


def open_tokenizer(path: Path) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """Functions that encode a prompt (special tokens recognised) and decode an answer, with the tokenizer beside a model.

    Raises:
        VerifyError: it is not there, or not readable.
        MachineError: its package is missing.
    """
    file = artifact_folder(path) / "tokenizer.json"
    try:
        if file.exists():
            tokenizer = load_package("tokenizers").Tokenizer.from_file(str(file))
            tokenizer.no_truncation()
            return lambda text: list(tokenizer.encode(text).ids), lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))
        file = file.with_name("tokenizer.model")
        processor = load_package("sentencepiece").SentencePieceProcessor(model_file=str(file))
    except MachineError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise VerifyError(f"{file}: cannot be read as a tokenizer: {str(error)[:300]}") from error
    return lambda text: list(processor.encode(text, add_bos=True)), lambda ids: str(processor.decode(ids))


def eos_ids(path: Path) -> list[int]:
    """Tokens that end a text, from the configuration beside the model."""
    for name in ("generation_config.json", "config.json"):
        try:
            eos_ids = json.loads((artifact_folder(path) / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        if eos_ids is not None:
            return [int(end) for end in (eos_ids if isinstance(eos_ids, list) else [eos_ids])]
    return []
