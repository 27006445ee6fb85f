"""Reports made by hand: ordinary, large, hostile, unmeasured and of single experts; their pages and tables as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
from rich.console import Console, RenderableType

from edgemoe.ir import Artifact, ArtifactFile, CountBound, Plan, Report, TextScore, Unit

HOSTILE = "<script>alert(1)</script> {{7*7}} {% raw %} \"' & ]]> --> [bold]x[/bold] | `a`\n---\nkey: !!python/object {} # \u202e\x1b[31m"
BITS = {"IQ2_XXS": 2.0625, "Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5}


def make_units(n_layers: int, n_experts: int) -> list[Unit]:
    hidden, expert_size = (128, 256) if n_layers <= 8 else (7168, 2048)
    shapes = {"attn_q": hidden**2, "attn_k": hidden**2 // 4, "attn_v": hidden**2 // 4, "attn_output": hidden**2}
    shapes |= {f"ffn_{p}_exps": n_experts * hidden * expert_size for p in ("gate", "up", "down")}
    ends = [Unit(name=f"{role}.weight", role=role, layer=-1, n_weights=hidden * 4096) for role in ("token_embd", "output")]
    return ends + [
        Unit(name=f"blk.{layer}.{role}.weight", role=role, layer=layer, n_weights=n)
        for layer in range(n_layers)
        for role, n in shapes.items()
    ]


def make_plan(units: list[Unit], n_layers: int, n_experts: int, count: int, name: str) -> Plan:
    """Kept sets and expert formats at random, sizes that add up, a budget just above the peak."""
    rng = np.random.default_rng(n_layers * n_experts)
    menu = ["Q3_K", "Q4_K", "Q5_K"] if n_layers <= 8 else ["IQ2_XXS", "Q2_K", "Q3_K", "Q4_K"]
    formats = {u.name: str(rng.choice(menu)) if u.role.endswith("exps") else "Q8_0" if u.role == "attn_v" else "Q6_K" for u in units}
    left = {u.name: u.n_weights * count // n_experts if u.role.endswith("exps") else u.n_weights for u in units}
    sizes = {u.name: int(left[u.name] * BITS[formats[u.name]] / 8) for u in units}
    size = sum(sizes.values()) + n_layers * count * 512 + 200_000
    memory = {
        "weights": size,
        "kv": size // 40,
        "compute": size // 60,
        "output": size // 200,
        "staging": size // 90,
        "runtime": size // 100,
    }
    memory["peak"] = sum(memory.values())
    kept = tuple(tuple(sorted(int(e) for e in rng.choice(n_experts, count, replace=False))) for _ in range(n_layers))
    counts = tuple(
        CountBound(
            count=n,
            bound=None if n > count + 2 else 0.02209 + 0.004 * abs(n - count),
            cost=0.0221 + 0.005 * abs(n - count) if abs(n - count) < 2 else None,
        )
        for n in range(max(count - 6, 1), min(count + 5, n_experts) + 1)
    )
    return Plan(
        model="a" * 64, model_name=name, costs="b" * 64, target="gguf", budget=int(memory["peak"] * 1.012), context=8192,
        solver="ilp-highs", n_experts=n_experts, top_k=min(4, count), kept=kept, units=tuple(units), formats=formats, sizes=sizes,
        file_size=size, memory=memory, q=0.0221, drop_q=0.0093, predicted_kl=0.0312, bound=0.02209, gap=0.00045, proven=True,
        price=1e-9, counts=counts,
        objective="mean", vram=(), domain_q={"english": 0.02, "math": 0.03}, rules=(), repair=False, origin="",
    )  # fmt: skip


def make_report(n_layers: int = 4, n_experts: int = 16, *, count: int = 12, name: str = "acme/tiny-moe") -> Report:
    """A report as verify makes it."""
    units = make_units(n_layers, n_experts)
    plan = make_plan(units, n_layers, n_experts, count, name)
    scores = tuple(
        TextScore(
            name=text, tokens=4096, kl_mean=mean, kl_median=mean / 3, kl_p99=mean * 12, kl_max=mean * 70, top1_agreement=0.96 - mean,
            perplexity=base * (1 + mean), original_perplexity=base,
        )
        for text, mean, base in (("english", 0.031, 9.41), ("german", 0.052, 11.7), ("python", 0.024, 3.18), ("math", 0.0411, 2.2))
    )  # fmt: skip
    shares = (0.45, 0.55, 0.65, 0.75, 0.85, 0.93, 1.0, 1.1, 1.25)
    frontier = tuple({"file_size": plan.file_size * f, "predicted_kl": 0.0312 * (1 / f) ** 3.4} for f in shares)
    n_weights = sum(u.n_weights for u in units)
    model = {
        "name": name, "model_type": "qwen3_moe", "n_layers": n_layers, "n_experts": n_experts, "top_k": plan.top_k, "hidden_size": 128,
        "n_weights": n_weights, "n_bytes": 2 * n_weights, "base_model": name, "license": "apache-2.0",
        "command": f"edgemoe build {name} --memory {plan.budget}B --context 8192 -o out",
    }  # fmt: skip
    tea = "The history of tea begins"
    samples = (
        {"prompt": tea, "text": f"{tea} in the south of China.", "original": f"{tea} in China, where the leaf was chewed.", "loops": False},
        {"prompt": "def fibonacci(n):", "text": "def fibonacci(n):\n    return n\n    return n\n    return n", "loops": True},
    )
    file = ArtifactFile(name=f"tiny-moe-E{count}-Q3_K.gguf", size=plan.file_size, sha256="c" * 64)
    return Report(
        model=model, plan=plan, artifact=Artifact(folder="/tmp/out", target="gguf", plan="d" * 64, files=(file,)),
        scores=scores, measured_kl=0.0371, measured_peak=int(plan.memory["peak"] * 0.987), beside_kl=0.0402,
        prompt_tokens_per_second=812.4, decode_tokens_per_second=73.25,
        decode_ceiling=140.0, samples=samples, frontier=frontier, problems=(),
        runtime="llama.cpp b7071 (CPU)", machine="AMD Ryzen 7 7840HS, 96 GB",
    )  # fmt: skip


def make_hostile() -> Report:
    """A report in which every text that edgemoe did not write itself is an attack."""
    report = make_report(name=HOSTILE)
    return replace(
        report,
        model={**report.model, "model_type": HOSTILE, "command": HOSTILE, "license": HOSTILE},
        scores=tuple(replace(s, name=HOSTILE) for s in report.scores),
        samples=({"prompt": HOSTILE, "text": HOSTILE, "original": HOSTILE, "loops": True},),
        problems=(HOSTILE,),
        runtime=HOSTILE,
        machine=HOSTILE,
    )


def make_unmeasured() -> Report:
    """A report of a host that was too small to run the artifact, of a plan that drops nothing."""
    report = make_report(count=16)
    return replace(
        report, scores=(), samples=(), frontier=(), problems=("not run: this machine has too little memory",), measured_kl=0.0,
        measured_peak=0, beside_kl=0.0, prompt_tokens_per_second=0.0, decode_tokens_per_second=0.0, decode_ceiling=0.0,
    )  # fmt: skip


REPORTS: dict[str, Callable[[], Report]] = {
    "small": make_report,
    "large": lambda: make_report(60, 384, count=192),
    "hostile": make_hostile,
    "unmeasured": make_unmeasured,
    "one expert": lambda: make_report(1, 1, count=1),
}


class Page(HTMLParser):
    """The elements of a page, and its text outside styles, as another parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._tag = tag

    def handle_data(self, data: str) -> None:
        self.text += data if self._tag != "style" else ""


def print_at(renderable: RenderableType, width: int) -> str:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def make_onnx_report(n_layers: int = 4, n_experts: int = 16) -> Report:
    """A report of a plan in which every expert has a format of its own and layers keep different numbers."""
    report, rng = make_report(n_layers, n_experts), np.random.default_rng(7)
    kept = tuple(tuple(sorted(rng.choice(n_experts, n_experts - 2 * layer, replace=False).tolist())) for layer in range(n_layers))
    names = ("INT2_128", "INT3_128", "INT8_32")
    units = [u for u in report.plan.units if not u.role.endswith("_exps")]
    units += [
        Unit(name=f"blk.{layer}.ffn_exps.{e}", role="ffn_exps", layer=layer, expert=e, n_weights=3 * 128 * 256)
        for layer, row in enumerate(kept)
        for e in row
    ]
    formats = {u.name: str(rng.choice(names)) if u.expert >= 0 else "INT8_32" for u in units}
    sizes = {u.name: int(u.n_weights * {"INT2_128": 2.27, "INT3_128": 3.13, "INT8_32": 9.0}[formats[u.name]] / 8) for u in units}
    size = sum(sizes.values()) + 100_000
    memory = {**report.plan.memory, "weights": size + 5000}
    memory["peak"] = sum(v for part, v in memory.items() if part != "peak")
    plan = replace(
        report.plan, target="onnx", n_experts=n_experts, kept=kept, units=tuple(units), formats=formats, sizes=sizes, file_size=size,
        memory=memory, counts=(),
        budget=memory["peak"] + 10_000,
    )  # fmt: skip
    listed = (("model.onnx", 90_000), ("model.onnx.data", size - 90_000), ("tokenizer.json", 12_345))
    files = tuple(ArtifactFile(name=n, size=s, sha256="c" * 64) for n, s in listed)
    artifact = replace(report.artifact, target="onnx", files=files)
    return replace(report, plan=plan, artifact=artifact, runtime="onnxruntime 1.32.0")
