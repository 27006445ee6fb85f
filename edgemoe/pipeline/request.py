"""This module holds the user's request and `prepare`, which makes all checks that need no work before any build."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from edgemoe.base.errors import UsageError
from edgemoe.base.ownership import check_outside
from edgemoe.devices.profiles import Device
from edgemoe.ir import Model
from edgemoe.ir.memory import DEFAULT_CONTEXT
from edgemoe.model.describe import resize_experts
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.emit import check_split, fixed_names
from edgemoe.pipeline.output_folder import check_output
from edgemoe.plan.solve import DEFAULT_GAP, SOLVERS
from edgemoe.price.choices import check_rounding
from edgemoe.repair.width import choose_top_k, choose_widths
from edgemoe.rules import Rule
from edgemoe.solvers.effort import SECONDS
from edgemoe.stream.texts import DEFAULT_TOKENS, Text, choose_texts
from edgemoe.stream.windows import WINDOW, tokenize
from edgemoe.targets import Target, find_target
from edgemoe.verify.artifact import DEFAULT_TOKENS as HELDOUT_TOKENS

MAX_CONTEXT = 2**27  # tokens; llama.cpp counts them in 32 bits
LOSSLESS = ("F64", "F32", "F16", "BF16", "Q8_0", "I32")  # types of a GGUF that are as good as the checkpoint, or nearly
LOSSY_SHARE = 0.01  # of a GGUF's bytes in other types, from which a warning is worth reading
DEFAULT_ROUNDS = 0  # of refinement; each round costs one more file written and run


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """The options of a build, as the user gave them."""

    model: str
    memory: int
    out: Path
    device: Device | None = None  # the box, if it is known; tensors that its processor holds twice count twice
    context: int | None = None
    target: str = "gguf"
    calibration: tuple[str, ...] = ()
    calibration_tokens: int = DEFAULT_TOKENS
    heldout: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    objective: str = "mean"
    solver: str = "highs"
    gap: float = DEFAULT_GAP
    seconds: float | None = SECONDS
    shard_max: int = 0
    repair: bool = True
    rounding: str = "feedback"
    refine: int = DEFAULT_ROUNDS
    width: str = ""  # neurons of every expert, "full" or "auto"; if empty, narrower experts are tried where bits are few
    top_k: int | None = None  # experts that the router picks; None: as in the checkpoint
    work: Path | None = None
    force: bool = False
    command: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request that passed all checks: the original model, its output folder, and the texts."""

    request: BuildRequest
    model: Model
    target: Target
    context: int
    widths: tuple[int, ...]  # of experts, falling, that are tried
    top_k: int  # experts that the router picks
    calibration: tuple[Text, ...]
    heldout: tuple[Text, ...]

    @property
    def smallest(self) -> Model:
        """The model with the narrowest experts that are tried, and with the number of active experts that the request asks for."""
        return resize_experts(self.model.with_top_k(self.top_k), self.widths[-1])


def prepare(request: BuildRequest) -> Job:
    """Check everything that can be checked before work starts, and change nothing; `check_needs` of doors.py goes on.

    Of the weights nothing is read, so the Job's model has no fingerprint yet (`hash_model`).

    Raises:
        EdgemoeError: the first UsageError, ModelError or MachineError that is found.
    """
    target = find_target(request.target)
    check_split(target, request.shard_max)
    check_outside(request.model, request.out, request.work)
    check_output(request.out, force=request.force, names=target.fixed_names)
    check_solver(request.solver)
    check_rounding(request.rounding)
    model = inspect_model(request.model, hashed=False)
    if model.architecture:
        request = settle_gguf(request, model)
    if warning := warn_of_source(model):
        logging.getLogger("edgemoe").warning(warning)
    check_output(request.out, force=request.force, names=fixed_names(target, model))
    context = choose_context(model, request.context)
    check_loads(model, context)
    calibration, heldout = choose_texts(request.calibration, request.heldout)
    for texts, tokens in ((calibration, request.calibration_tokens), (heldout, HELDOUT_TOKENS)):
        tokenize(model, texts, tokens, WINDOW)  # a text without tokens, or a tokenizer that does not load, is found now
    return Job(
        request=request,
        model=model,
        target=target,
        context=context,
        widths=choose_widths(model, request.width, target.form),
        top_k=choose_top_k(model, request.top_k),
        calibration=calibration,
        heldout=heldout,
    )


def settle_gguf(request: BuildRequest, model: Model) -> BuildRequest:
    """The request for a GGUF, whose experts keep their width.

    Raises:
        UsageError: an option that a GGUF cannot have.
    """
    check_source(model, request.target)
    if request.width not in ("", "full", str(model.expert.size)):
        raise UsageError(f"--width {request.width}: experts of a GGUF keep their neurons", hint="leave --width out")
    if request.top_k not in (None, model.top_k):
        raise UsageError(f"--top-k {request.top_k}: a GGUF's router picks {model.top_k}", hint="leave --top-k out")
    return replace(request, width="full")


def check_loads(model: Model, context: int) -> None:
    """Let llama.cpp look at a GGUF in a process of its own, because some malformed files stop the whole process that loads them.

    Raises:
        ModelError: llama.cpp does not take it.
    """
    if model.architecture:
        find_target("gguf").memory_parts(model, context)


def check_source(model: Model, target: str) -> None:
    """Refuse to make anything but a GGUF of a GGUF, which holds no graph and no tokenizer for other runtimes.

    Raises:
        UsageError: names the target.
    """
    if model.architecture and target != "gguf":
        hint = "give the checkpoint that it was made from, or leave --target out"
        raise UsageError(f"--target {target}: {model.name} is a GGUF, and a GGUF is all that can be made of it", hint=hint)


def choose_context(model: Model, asked: int | None) -> int:
    """The context to plan for: the context asked for, else the smaller of 8192 and the trained context.

    Raises:
        UsageError: the context is less than a token, or so large that it can only be a mistake.
    """
    if asked is None:
        return min(DEFAULT_CONTEXT, model.context_length)
    if not 0 < asked <= MAX_CONTEXT:
        raise UsageError(f"--context {asked} is not between 1 and {MAX_CONTEXT} tokens")
    return asked


def warn_of_context(model: Model, context: int) -> str:
    """A warning for a user who asks for more context than the model was trained for, else an empty text."""
    if context <= model.context_length:
        return ""
    return f"context {context} is more than the {model.context_length} tokens that {model.name} was trained for: expect poor text beyond"


def warn_of_source(model: Model) -> str:
    """A warning for a user whose GGUF has lost quality already, which no figure of the report shows, else an empty text."""
    sizes: dict[str, int] = {}
    for tensor in model.tensors if model.architecture else ():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.n_bytes
    lossless = (*LOSSLESS, "MXFP4") if model.architecture == "gpt-oss" else LOSSLESS  # its checkpoint has MXFP4 itself
    lossy = sum(size for kind, size in sizes.items() if kind not in lossless) / max(sum(sizes.values()), 1)
    if lossy < LOSSY_SHARE:
        return ""
    return f"{lossy:.0%} of {model.name} is quantized below Q8_0 already: KL is measured against this file, whose own loss nobody sees here"


def check_solver(name: str) -> None:
    """Refuse an unknown solver before hours of work.

    Raises:
        UsageError: names those that are known.
    """
    if name not in SOLVERS:
        raise UsageError(f"solver {name!r} is not known", hint=f"known: {', '.join(SOLVERS)}")
