"""This module writes the lines of reports and cards that say how mlx_lm runs an MLX folder."""

from __future__ import annotations

from functools import partial

from edgemoe.ir import Report
from edgemoe.targets import Words
from edgemoe.targets.mlx.settings import KV_GROUP, Settings

CHIPS = {"M4 Pro": 273e9, "M4 Max": 546e9, "M3 Ultra": 819e9}  # bytes per second that the memory gives at most
REACHED = 0.95  # of it, in Apple's table of Qwen3-30B-A3B on an M4 Max (mlx_lm/BENCHMARKS.md)
SMALLEST = 5 * 2**30  # bytes of the working set of the smallest Mac, of 8 GB
VAGUE = 4.0  # times the lower end of a range from which the range says nothing
LAUNCHES = 5.2e-3 / 48  # seconds of a layer in the same table, however few bytes it reads


def speed_range(report: Report, bandwidth: float) -> tuple[float, float]:
    """Tokens per second between the fit to Apple's table and what bandwidth alone would allow; an estimate, nothing was run on a Mac."""
    read = report.plan.active_bytes + report.plan.memory["kv"]
    layers = int(report.model["n_layers"])
    return 1 / (LAUNCHES * layers + read / (REACHED * bandwidth)), bandwidth / read


def launch_lines(report: Report, settings: Settings) -> list[str]:
    """Commands of mlx_lm that run the artifact, on a Mac."""
    chunk = f" --prefill-step-size {settings.chunk}" if settings.job else ""
    quantized = f" --kv-bits {settings.kv_bits} --kv-group-size {KV_GROUP} --quantized-kv-start 0" if settings.kv_bits else ""
    most = f" --max-kv-size {settings.max_kv}" if settings.max_kv else ""
    held = report.plan.memory["peak"]
    speeds = [(chip, *speed_range(report, bandwidth)) for chip, bandwidth in CHIPS.items()]
    mib = -(-held // 2**20)
    return [
        "pip install 'mlx>=0.32.2' 'mlx-lm>=0.32.2'",
        f"mlx_lm.generate --model . --max-tokens {min(report.plan.context, 512)}{chunk}{quantized}{most} --prompt 'Once upon a time'",
        f"mlx_lm.chat --model .{chunk}{most}  # mlx_lm.server has no --max-kv-size"
        if settings.max_kv
        else f"mlx_lm.server --model . --port 8080{chunk}{quantized}",
        *([f"# if Metal's recommended working set is below {mib} MiB: sudo sysctl iogpu.wired_limit_mb={mib}"] if held > SMALLEST else []),
        *(
            f"# decoding, estimated: {low:.0f} to {high:.0f} tokens per second on an {chip}"
            for chip, low, high in speeds
            if high < VAGUE * low
        ),
        "# to publish it: hf upload NAME .  (mlx_lm.upload would replace the card)",
    ]


def words_of(settings: Settings, plain: str) -> Words:
    """The words for a folder with these settings, whose floats have this type."""
    cache, note = "", ""
    if settings.kv_bits:
        cache = f", {settings.kv_bits}-bit KV"
        note = f" It also reads every earlier token from a cache of {settings.kv_bits} bits, which the prediction does not know."
    if settings.max_kv:
        cache = f", KV of {settings.max_kv}"
        note = f" What a text loses when tokens leave a cache of {settings.max_kv} is measured in short windows only."
    return Words(
        library="mlx",
        beside=f"16-bit activations{cache}",
        beside_in_summary=True,
        beside_note='"Measured" is the file with float32 activations, as in the prediction; "16-bit activations" is the same file with the '
        f"output of every module rounded to the folder's float type, while sums stay float32, as on a Mac.{note} "
        "Peak and speed are measured on a Mac alone; elsewhere the tensors that mlx holds are compared with those of the plan.",
        launch_note="In the folder of this file, on a Mac.  The promise is Metal's active memory for one sequence that fills the context; "
        "Python and its libraries are apart.",
        language="sh",
        plain=plain,
        launch_lines=partial(launch_lines, settings=settings),
    )
