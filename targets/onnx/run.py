"""Run model.onnx in a child process with ONNX Runtime: a crash there is an error here, and its peak memory is its own.

Prompts are tokenized here, with the tokenizer that lies beside the model, so that the child holds nothing but the runtime.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgemoe.errors import MachineError, VerifyError
from edgemoe.ir import Model
from edgemoe.targets.child_process import OnLogits, run_job
from edgemoe.targets.onnx.layout import home_of

CHILD = Path(__file__).with_name("child.py")
INSTALL = "pip install 'edgemoe[onnx]'"
NEEDS = "edgemoe.least_onnxruntime"  # metadata entry of the file: the least version that runs it
LEAST = (1, 31)  # block-wise experts of 4 and 8 bits are dequantized at every call before (50 times slower)
TOKENIZER = "tokenizer.json"


def run(path: Path, job: Mapping[str, Any], on_logits: OnLogits | None = None) -> dict[str, Any]:
    """Run one job (see child.py, but prompts are texts) and return its result.

    Args:
        path: model.onnx, with its data file and tokenizer beside it.
        job: what to do, plain values.
        on_logits: called with (window number, logits [tokens, vocab]) as they come.

    Raises:
        VerifyError: it does not load, or ONNX Runtime stopped; with its own last words.
        MachineError: onnxruntime is missing or too old.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise MachineError("onnxruntime is not installed", hint=INSTALL)
    prompts = list(job.get("prompts", ()))
    tokenizer = _open_tokenizer(path) if prompts else None
    ids = [tokenizer.encode(prompt).ids for prompt in prompts] if tokenizer else []
    asked = [number for number, each in enumerate(ids) if each]
    full = {**job, "prompts": [ids[number] for number in asked], "ends": _ends(path), "needs": list(_needs(path))}
    result = run_job(CHILD, path, full, on_logits, runtime="onnxruntime", hint=INSTALL, environment={})
    if tokenizer:
        texts = [tokenizer.decode(tokens, skip_special_tokens=False) for tokens in result["samples"]]
        result["samples"] = [
            {"prompt": prompts[number], "text": text, "tokens": tokens}
            for number, text, tokens in zip(asked, texts, result["samples"], strict=True)
        ]
    return result


def check_tokenizer(path: Path, model: Model, lines: Sequence[str]) -> list[str]:
    """Lines that the tokenizer beside model.onnx reads otherwise than the checkpoint's own."""
    import transformers

    ours = _open_tokenizer(path)
    original = transformers.AutoTokenizer.from_pretrained(model.folder, local_files_only=True)
    return [line for line in lines if ours.encode(line).ids != original(line)["input_ids"]]


def runtime() -> str:
    """What runs an ONNX model here."""
    try:
        return f"onnxruntime {version('onnxruntime')}"
    except PackageNotFoundError:
        return "unknown"


def _open_tokenizer(path: Path) -> Any:
    """The tokenizer beside a model.

    Raises:
        VerifyError: it is not there, or not readable.
        MachineError: the tokenizers package is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MachineError("the tokenizers package is not installed", hint="pip install 'edgemoe[hf]'") from error
    file = home_of(path) / TOKENIZER
    try:
        return Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001  (tokenizers raises plain Exception)
        raise VerifyError(f"{file}: cannot be read as a tokenizer: {error}") from error


def _ends(path: Path) -> list[int]:
    """Tokens that end a text, from the configuration beside the model."""
    for name in ("generation_config.json", "config.json"):
        try:
            ends = json.loads((home_of(path) / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        if ends is not None:
            return [int(end) for end in (ends if isinstance(ends, list) else [ends])]
    return []


def _needs(path: Path) -> tuple[int, ...]:
    """The least version of onnxruntime that runs the file."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        entries = onnx.load(str(path), load_external_data=False).metadata_props
        said = next(entry.value for entry in entries if entry.key == NEEDS)
        return max(LEAST, tuple(int(part) for part in said.split(".")[:2]))
    except (OSError, DecodeError, StopIteration, ValueError):  # then onnxruntime itself says what is wrong with the file
        return LEAST
