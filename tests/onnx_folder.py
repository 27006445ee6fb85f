"""Folders for ONNX runtimes, and plain onnxruntime's own words, with which every other runtime is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny import flat_plan, flat_stats

from edgemoe.ir import Artifact, Plan, Unit
from edgemoe.model.inspect import inspect_model
from edgemoe.targets import find_target


def write_folder(
    source: Path, out: Path, choose: Callable[[Unit], str] | str, kept: Sequence[Sequence[int]] | None = None, target: str = "onnx"
) -> tuple[Plan, Artifact]:
    """Write a checkpoint as a plan that nobody solved says: each unit in the format that `choose` gives it."""
    model, to = inspect_model(source), find_target(target)
    plan = replace(flat_plan(model, choose, kept, target), context=model.context_length)
    out.mkdir(parents=True)
    work = out.with_name(out.name + "-stats")
    work.mkdir()
    return plan, to.write(model, flat_stats(model, work), plan, out, 0, None)


def open_session(path: Path) -> tuple[Any, dict[str, NDArray[np.float32]]]:
    """A session of plain onnxruntime, and the empty cache that it begins with."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    cache = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs() if i.name.startswith("past")}
    return session, cache


def greedy(path: Path, ids: Sequence[int], count: int, ends: Sequence[int] = ()) -> list[int]:
    """The most likely token, `count` times or until one of `ends`, with the cache fed back."""
    session, cache = open_session(path)
    names = [o.name for o in session.get_outputs()]
    made: list[int] = []
    feed = np.array([ids], np.int64)
    while len(made) < count:
        mask = np.ones((1, len(ids) + len(made)), np.int64)
        results = dict(zip(names, session.run(None, {"input_ids": feed, "attention_mask": mask, **cache}), strict=True))
        token = int(results["logits"][0, -1].argmax())
        if token in ends:
            break
        made.append(token)
        feed = np.array([[token]])
        cache = {name.replace("present", "past_key_values"): value for name, value in results.items() if name.startswith("present")}
    return made


def regrets(path: Path, ids: Sequence[int], made: Sequence[int]) -> NDArray[np.float32]:
    """How much less likely each token of `made` is than the best one after the same beginning: difference of logits, 0 for the best."""
    session, cache = open_session(path)
    whole = np.array([[*ids, *made]], np.int64)
    logits = session.run(["logits"], {"input_ids": whole, "attention_mask": np.ones_like(whole), **cache})[0][0, len(ids) - 1 : -1]
    result: NDArray[np.float32] = logits.max(axis=1) - logits[np.arange(len(made)), list(made)]
    return result
