"""This module runs model.onnx in a child process with ONNX Runtime; a crash of the child becomes an error, and its peak memory is its own.

Prompts are tokenized here, with the tokenizer that lies beside the model, so that the child holds only the runtime.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgemoe.base.errors import MachineError, ModelError, VerifyError
from edgemoe.ir import Model
from edgemoe.model.tokenizer import load_package
from edgemoe.targets.child_process import OnLogits, run_job
from edgemoe.targets.gguf.vocabulary_check import tokenize_original
from edgemoe.targets.onnx.graph_builder import import_onnx

CHILD = Path(__file__).with_name("child.py")
INSTALL = "pip install 'edgemoe[onnx]'"
NEEDS = "edgemoe.least_onnxruntime"  # metadata entry of the file: the least version that runs it
LEAST = (1, 31)  # earlier versions dequantize block-wise experts of 4 and 8 bits at every call, which is 50 times slower


def run(path: Path, job: Mapping[str, Any], on_logits: OnLogits | None = None) -> dict[str, Any]:
    """Run one job (see child.py, but prompts are texts) and return its result.

    Args:
        path: model.onnx, with its data file and tokenizer beside it.
        job: the job as plain values.
        on_logits: called with (window number, logits [tokens, vocab]) as the logits come.

    Raises:
        VerifyError: the model does not load, or ONNX Runtime stopped; the message has its last output.
        MachineError: onnxruntime is missing or too old.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise MachineError("onnxruntime is not installed", hint=INSTALL)
    prompts = list(job.get("prompts", ()))
    encode, decode = _open_tokenizer(path) if prompts else (None, None)
    ids = {prompt: tokens for prompt in prompts if (tokens := encode(prompt))} if encode else {}
    full = {**job, "prompts": list(ids.values()), "ends": _eos_ids(path), "needs": list(_needs(path))}
    result = run_job(CHILD, path, full, on_logits, runtime="onnxruntime", hint=INSTALL, environment={})
    if decode:
        answers = zip(ids, result["samples"], strict=True)
        result["samples"] = [{"prompt": prompt, "text": decode(tokens), "tokens": tokens} for prompt, tokens in answers]
    return result


def check_tokenizer(path: Path, model: Model, lines: Sequence[str]) -> list[str]:
    """Lines that the tokenizer beside model.onnx tokenizes otherwise than the checkpoint's own.

    Raises:
        VerifyError: there is no tokenizer beside the model, or it does not load.
    """
    expected = tokenize_original(Path(model.folder), lines)
    try:
        ours = tokenize_original(_folder(path), lines)
    except ModelError as error:
        raise VerifyError(str(error)) from error
    return [line for line, tokens, original in zip(lines, ours, expected, strict=True) if tokens != original]


def runtime() -> str:
    """Name and version of the runtime that runs an ONNX model here."""
    try:
        return f"onnxruntime {version('onnxruntime')}"
    except PackageNotFoundError:
        return "unknown"


def _folder(path: Path) -> Path:
    """The folder of an artifact's small files: that of the model, or the folder above it (transformers.js' layout)."""
    return path.parent if (path.parent / "config.json").exists() else path.parent.parent


def _open_tokenizer(path: Path) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """Functions that encode a prompt (special tokens recognised) and decode an answer, with the tokenizer beside a model.

    Raises:
        VerifyError: it is not there, or not readable.
        MachineError: its package is missing.
    """
    file = _folder(path) / "tokenizer.json"
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


def _eos_ids(path: Path) -> list[int]:
    """Tokens that end a text, from the configuration beside the model."""
    for name in ("generation_config.json", "config.json"):
        try:
            eos_ids = json.loads((_folder(path) / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        if eos_ids is not None:
            return [int(end) for end in (eos_ids if isinstance(eos_ids, list) else [eos_ids])]
    return []


def _needs(path: Path) -> tuple[int, ...]:
    """The least version of onnxruntime that runs the file."""
    onnx = import_onnx()
    from google.protobuf.message import DecodeError

    try:
        entries = onnx.load(str(path), load_external_data=False).metadata_props
        said = next(entry.value for entry in entries if entry.key == NEEDS)
        return max(LEAST, tuple(int(part) for part in said.split(".")[:2]))
    except (OSError, DecodeError, StopIteration, ValueError):  # onnxruntime itself then says what is wrong with the file
        return LEAST
