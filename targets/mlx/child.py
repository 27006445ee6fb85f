"""This script runs in the child process: it loads an MLX folder with stock mlx_lm and does one job (see child_main.py).

Logits go to stdout as float32.

Jobs:
    {"windows": [[ids]], "half": ""}: the logits of every position of every window, with float32 activations; with "half": "float16" or
    "bfloat16", what each module gives is rounded to this type, as a Mac would have it, while sums stay float32; with settings of the cache,
    every token sees the tokens before it through such a cache;
    {"context": n, "tokens": [ids], "prompts": [[ids]], "generate": n, "ends": [ids]}: run a context, measure, and continue the prompts
    greedily.

Settings of the cache, for both: {"kv_bits": n or 0, "kv_group": n, "max_kv": n or 0, "chunk": n}, as mlx_lm's --kv-bits and so on.

On a Mac the context is filled as a user would fill it, in the folder's own type, and peak and speed are Metal's.  Elsewhere mlx runs on the
CPU, which sums products in the type of the activations (no Mac does) and has no float16 for plain expert stacks.  There the activations
are float32, prompts are continued in CPU_CONTEXT tokens, and peak and speed are 0: they would say nothing of a Mac.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

LACKING = 5  # exit code: this machine lacks something
LEAST = (0, 32, 2)  # of mlx; older ones give garbage for some shapes on an M5
CPU_CONTEXT = 512
CHUNK = 2048  # tokens of a prompt that are computed together, if the job says nothing else
OnPrompt = Callable[[int, int], None] | None  # called with (tokens done, all tokens) of a prompt


def _packages() -> tuple[Any, Any]:
    """mlx.core and mlx_lm.utils."""
    try:
        import mlx.core as mx
        from mlx_lm import utils
    except ImportError as error:
        sys.stderr.write(f"mlx or mlx_lm cannot be imported: {error}\n")
        raise SystemExit(LACKING) from None
    found = version("mlx")
    if tuple(int(part) for part in re.findall(r"\d+", found)[:3]) < LEAST:
        sys.stderr.write(f"mlx {found} is too old: {'.'.join(map(str, LEAST))} or newer is needed\n")
        raise SystemExit(LACKING)
    return mx, utils


class Runner:
    """The loaded model, strictly: every tensor has a place and every place has a tensor."""

    def __init__(self, job: dict[str, Any], *, full: bool) -> None:
        self.mx, utils = _packages()
        self.metal = self.mx.metal.is_available()
        self.model, _ = utils.load_model(Path(job["path"]).parent, strict=True)
        self.active = self.mx.get_active_memory()
        if full:
            self.widen()
        self.bits, self.group, self.most = (int(job.get(name, 0)) for name in ("kv_bits", "kv_group", "max_kv"))
        self.chunk = int(job.get("chunk", CHUNK))

    def widen(self) -> None:
        """Compute in float32: scales, offsets and plain weights are widened exactly."""
        from mlx.utils import tree_map

        mx = self.mx
        self.model.update(tree_map(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a, self.model.parameters()))

    def cache(self) -> Any:
        """An empty cache of the kind that the job asks for."""
        from mlx_lm.models.cache import make_prompt_cache

        made = make_prompt_cache(self.model, self.most or None)
        return [each.to_quantized(group_size=self.group, bits=self.bits) for each in made] if self.bits else made

    def logits(self, tokens: Sequence[int]) -> Any:
        """Logits [tokens, vocab] in float32."""
        cache = self.cache() if self.bits or self.most else None
        out = self.model(self.mx.array([list(tokens)]), cache=cache)[0].astype(self.mx.float32)
        self.mx.eval(out)
        return out

    def generate(
        self, tokens: Sequence[int], n: int, eos_ids: Sequence[int], on_prompt: Callable[[int, int], None] | None = None
    ) -> list[int]:
        """The most likely continuation, until its end or `n` tokens, by mlx_lm's own loop."""
        from mlx_lm.generate import generate_step

        out: list[int] = []
        quantized = {"kv_bits": self.bits, "kv_group_size": self.group, "quantized_kv_start": 0} if self.bits else {}
        steps = generate_step(
            self.mx.array(list(tokens)),
            self.model,
            max_tokens=n,
            prompt_progress_callback=on_prompt,
            prefill_step_size=self.chunk,
            max_kv_size=self.most or None,
            **quantized,
        )
        for token, _ in steps:
            if int(token) in eos_ids:
                break
            out.append(int(token))
        return out


def round_outputs(mx: Any, model: Any, dtype: str) -> None:
    """Let every class of module in a model round what it gives to 16 bits, and hand it on as float32."""
    half = getattr(mx, dtype)

    def wrap(call: Any) -> Any:
        @functools.wraps(call)
        def rounded(*args: Any, **kwargs: Any) -> Any:
            out = call(*args, **kwargs)
            return out.astype(half).astype(mx.float32) if isinstance(out, mx.array) else out

        return rounded

    for kind in {type(module) for module in model.modules()} - {type(model)}:
        if "__call__" in vars(kind):
            kind.__call__ = wrap(kind.__call__)


def give_logits(job: dict[str, Any]) -> dict[str, Any]:
    """Logits of every window to stdout."""
    import numpy as np

    runner = Runner(job, full=True)
    if job.get("half"):
        round_outputs(runner.mx, runner.model, job["half"])
    for window in job["windows"]:
        sys.stdout.buffer.write(np.asarray(runner.logits(window)).data)
    sys.stdout.buffer.flush()
    return {"active": runner.active}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Samples; on a Mac, also the peak and the speed of a full context."""
    metal = _packages()[0].metal.is_available()
    runner = Runner(job, full=not metal)
    found = fill_context(runner, job) if metal else {"metal_peak": 0, "prompt_tokens_per_second": 0.0, "decode_tokens_per_second": 0.0}
    context, generate = int(job["context"]), int(job["generate"])
    context = context if metal else min(context, CPU_CONTEXT)
    samples = []
    for prompt in job["prompts"]:
        ids = prompt[: max(1, context - generate - 1)]
        samples.append(runner.generate(ids, min(generate, context - len(ids)), job["ends"]))
    return {**found, "samples": samples, "active": runner.active}


def fill_context(runner: Runner, job: dict[str, Any]) -> dict[str, Any]:
    """Peak and speed of a full context, as a user would fill it."""
    context, tokens = int(job["context"]), job["tokens"]
    new = min(32, max(1, context // 4))
    filled = (tokens * (context // len(tokens) + 1))[: context - new]
    marks = [time.perf_counter()]
    runner.mx.reset_peak_memory()
    runner.generate(filled, new, (), lambda done, total: marks.append(time.perf_counter()) if done == total else None)
    end = time.perf_counter()
    return {
        "metal_peak": runner.mx.get_peak_memory(),
        "prompt_tokens_per_second": len(filled) / max(marks[-1] - marks[0], 1e-9),
        "decode_tokens_per_second": new / max(end - marks[-1], 1e-9),
    }


def do(job: dict[str, Any]) -> dict[str, Any]:
    """The job of child_main.py."""
    return give_logits(job) if "windows" in job else measure(job)
