"""This module loads the tokenizer of a checkpoint from tokenizer.json or tokenizer.model, the files from which artifacts get theirs.

Nothing else of the folder is read, and transformers is not asked: names in tokenizer_config.json would lead it to other files, and to code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgemoe.base.errors import MachineError, ModelError
from edgemoe.base.storage import read_json, regular_size

MAX_TOKENIZER = 256 * 2**20  # bytes of a tokenizer file; the largest known has 34 MB
Encode = Callable[[str], list[int]]


def load_package(name: str) -> Any:
    """A package that only some tokenizers need.

    Raises:
        MachineError: not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MachineError(f"the package {name} is not installed", hint="pip install 'edgemoe[hf]'") from error


def load_tokenizer(folder: Path, *, special: bool) -> Encode:
    """The function from a text to its tokens, without BOS.

    Args:
        folder: of the checkpoint.
        special: texts of special tokens, such as <|im_end|>, become these tokens; else they are read as plain text, as llama.cpp does.

    Raises:
        ModelError: there is no tokenizer, or it does not load.
        MachineError: a package is missing.
    """
    file = folder / "tokenizer.json"
    if file.exists():
        return _load_json(file, special=special)
    file = folder / "tokenizer.model"
    if not file.exists():
        raise ModelError(f"{folder}: neither tokenizer.json nor tokenizer.model is there", hint="finish the download")
    if regular_size(file) > MAX_TOKENIZER:
        raise ModelError(f"{file}: more than {MAX_TOKENIZER} bytes is too large for a tokenizer")
    package = load_package("sentencepiece")
    try:
        processor = package.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{file}: does not load: {str(error)[:300]}") from error
    encode: Encode = processor.encode
    return encode


def _load_json(file: Path, *, special: bool) -> Encode:
    package = load_package("tokenizers")
    read_json(file, MAX_TOKENIZER)

    def guard(step: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return step(*arguments, **options)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise ModelError(f"{file}: does not load: {str(error)[:300]}") from error

    tokenizer = guard(package.Tokenizer.from_file, str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not special
    return lambda text: guard(tokenizer.encode, text, add_special_tokens=False).ids
