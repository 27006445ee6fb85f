"""This module packs a whole GGUF with feedback, and gives the Model whose tensors lie in the work folder (docs/decisions/0020)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgemoe.base.progress import Progress
from edgemoe.base.storage import array_file, load_arrays, save_arrays
from edgemoe.base.threads import open_threads
from edgemoe.base.types import F32
from edgemoe.base.work import key_of, open_or_make, path_of
from edgemoe.ir import Model, Plan, Stats
from edgemoe.model.checkpoint import read_tensor
from edgemoe.model.overlay import open_overlay, save_overlay
from edgemoe.quantize.gptq import factor_hessian
from edgemoe.quantize.importance import importance_of
from edgemoe.repair.engine_matrices import map_of, pack_layer
from edgemoe.repair.quantize_layer import ErrorMetric, plan_quantization, quantize_matrix
from edgemoe.repair.survivors import EPOCHS
from edgemoe.repair.two_streams import DOMAIN_POWER, GUARD_EVERY, TwoStreams
from edgemoe.stream.texts import DEFAULT_TOKENS, Text, texts_key
from edgemoe.stream.windows import WINDOW
from edgemoe.targets import find_target


def round_gguf(
    model: Model,
    texts: Sequence[Text],
    stats: Stats,
    plan: Plan,
    work: Path,
    *,
    max_tokens: int = DEFAULT_TOKENS,
    progress: Progress | None = None,
) -> Model:
    """Pack every matrix of a GGUF's Model in the plan's format, on the inputs that the rounded stream brings it.

    Args:
        model: complete, of a GGUF.
        texts: calibration texts.
        stats: of these texts.
        plan: says which experts stay, and in which formats.
        work: folder for the new rows, in a subfolder named by a hash of the inputs; the state of a killed run lies there too.
        max_tokens: of all texts together.
        progress: called with (layers done, all layers).

    Raises:
        ModelError: llama.cpp does not load the file, or the texts give no tokens.
    """
    quantize_plan = plan_quantization(model, stats, plan, find_target(plan.target), Path())
    fit = (WINDOW, max_tokens, GUARD_EVERY, DOMAIN_POWER, plan.repair)
    key = key_of("rounded", model.fingerprint, texts_key(texts), plan.kept, fit, stats.key, plan.formats)
    folder = path_of(work.absolute(), "rounded", key)

    def make() -> Model:
        streams = TwoStreams(model, model, texts, max_tokens, folder, key, quantize_plan)
        try:
            start = int(streams.steps.read()["done"])
            if start == 0:
                start_states(streams)
            if progress:
                progress(start, model.n_layers)
            for layer in range(start, model.n_layers):
                pack_layer(streams, layer, plan.kept_of.get(layer, ()), epochs=EPOCHS if plan.repair else -1)
                if progress:
                    progress(layer + 1, model.n_layers)
            pack_output(streams)
        finally:
            streams.original.close()
        return save_overlay(model, folder, quantize_plan.formats)

    return open_or_make(folder, lambda: open_overlay(model, folder, quantize_plan.formats), make)


def pack_embedding(streams: TwoStreams) -> F32 | None:
    """Pack the embedding by the stock quantizer, and return what it decodes to; None if it stays as it is."""
    plan = streams.quantize_plan
    assert plan is not None
    tensor, kind = plan.model.get("token_embd"), plan.format_of("token_embd", -1)
    if kind == tensor.dtype:
        save_arrays(streams.work / array_file(-1), {})
        return None
    rows, importance = read_tensor(plan.model.folder, tensor), importance_of(plan.model, plan.stats, -1)
    with open_threads() as pool:
        packed, values = quantize_matrix(plan.target, rows, kind, importance.get(("token_embd", -1)), None, pool)
    save_arrays(streams.work / array_file(-1), {"token_embd.-1": packed})
    return values


def pack_output(streams: TwoStreams) -> None:
    """Pack the output matrix on the last states of the rounded stream; a tied embedding was packed already."""
    plan, stream = streams.quantize_plan, streams.original
    assert plan is not None
    output = plan.model.find("output")
    if output is None or plan.format_of("output", -1) == output.dtype:
        return
    changed, original = (streams.states(name, plan.model.n_layers) for name in ("changed", "original"))
    sums = streams.sums(changed, original, lambda x, y: (stream.normed(x), stream.normed(y)))
    rows, metric = (
        read_tensor(plan.model.folder, output) @ map_of(sums),
        ErrorMetric(inputs=factor_hessian(sums[0].gram), guard=sums[1].gram),
    )
    columns = importance_of(plan.model, plan.stats, -1)["output", -1]
    with open_threads() as pool:
        packed = quantize_matrix(plan.target, rows, plan.format_of("output", -1), columns, metric, pool)[0]
    save_arrays(streams.work / array_file(-1), {**load_arrays(streams.work / array_file(-1)), "output.-1": packed})
    changed.close()
    original.close()


def start_states(streams: TwoStreams) -> None:
    """Write the states of both streams before the first layer."""
    original, changed = (streams.states(name, 0) for name in ("original", "changed"))
    table = pack_embedding(streams)
    for index in streams.windows.chunks():
        original.write(index, streams.original.embed(streams.windows.tokens[index]))
        changed.write(index, streams.original.embed(streams.windows.tokens[index], table))
    original.close()
    changed.close()
