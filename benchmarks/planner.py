"""This script times planning: shapes, forms, rules and solvers are combined, and each case has a process of its own.

    python benchmarks/planner.py [--shape kimi-k2] [--form experts] [--rules none] [--solver highs]

Prices are synthetic, with heavy tails; what is timed is Costs in memory -> Plan.  Writes benchmarks/results/planner.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import table
from arguments import make_parser

from edgemoe.ir import Costs, Plan, Router, Unit
from edgemoe.model.routing.kept_sets import offered_counts
from edgemoe.plan.solve import solve_plan
from edgemoe.rules import ActiveBytes, GroupKept, Keep, Rule
from edgemoe.rules.linear import sum_units
from edgemoe.solvers import columns, ilp
from edgemoe.solvers.highs import end_child
from edgemoe.targets.gguf.formats import FORMATS, WIDE, pad, row_bytes
from edgemoe.targets.gguf.memory import is_repacked, staged_bytes

RESULTS = Path(__file__).parent / "results" / "planner.md"
FORMS = ("experts", "stacks")
RULES = ("none", "active bytes", "pins and groups")
SOLVERS = ("highs", "cbc", "lagrange")
SHARE = 0.30  # budget, as a share of the size with every tensor in Q8_0
ACTIVE = 0.93  # of the active bytes of the plan without rules
PINS = 20
DOMAINS = ("english", "german", "python", "math")
CONTEXT_BYTES = {"context": 8192, "runtime": 2 * 10**8, "kv": 10**9, "compute": 3 * 10**8, "output": 10**6}
MOST_SECONDS = 120  # wall clock, of a case
COLUMNS = """\
Each row plans one synthetic price list in a process of its own.  The form "experts" gives every expert a format, and "stacks" gives one
format to all experts of a layer's matrix.  The rules "active bytes" limit what a token reads, and "pins and groups" pin single experts
and keep some of every routing group.  "Experts kept" is the share of experts that the plan keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model by its config.json (Hugging Face, 2026-11); `check` is its number of weights in 10^9 as published."""

    layers: int
    dense: int = 0  # leading layers without experts
    experts: int
    top_k: int
    hidden: int
    width: int  # of an expert
    dense_width: int = 0
    shared_width: int = 0
    attention: tuple[tuple[str, int, int], ...]  # role, rows, cols
    vocab: int
    groups: int  # routing groups of the rule
    check: float


def grouped_query(heads: int, kv: int, hidden: int, head: int = 128) -> tuple[tuple[str, int, int], ...]:
    """Attention with fewer key than query heads."""
    return (
        ("attn_q", heads * head, hidden),
        ("attn_k", kv * head, hidden),
        ("attn_v", kv * head, hidden),
        ("attn_output", hidden, heads * head),
    )


def latent(heads: int, hidden: int) -> tuple[tuple[str, int, int], ...]:
    """Latent attention of DeepSeek-V3: query rank 1536, key rank 512 + 64 rotary, heads of 128 + 64 and 128."""
    return (
        ("attn_q_a", 1536, hidden),
        ("attn_q_b", heads * 192, 1536),
        ("attn_kv_a_mqa", 576, hidden),
        ("attn_kv_b", heads * 256, 512),
        ("attn_output", hidden, heads * 128),
    )


SHAPES = {
    "mixtral-8x7b": Shape(
        layers=32, experts=8, top_k=2, hidden=4096, width=14336, attention=grouped_query(32, 8, 4096), vocab=32000, groups=4, check=46.703
    ),
    "qwen3-30b-a3b": Shape(
        layers=48, experts=128, top_k=8, hidden=2048, width=768, attention=grouped_query(32, 4, 2048), vocab=151936, groups=8, check=30.532
    ),
    "qwen3-235b-a22b": Shape(
        layers=94,
        experts=128,
        top_k=8,
        hidden=4096,
        width=1536,
        attention=grouped_query(64, 4, 4096),
        vocab=151936,
        groups=8,
        check=235.094,
    ),
    "deepseek-v3": Shape(
        layers=61,
        dense=3,
        experts=256,
        top_k=8,
        hidden=7168,
        width=2048,
        dense_width=18432,
        shared_width=2048,
        attention=latent(128, 7168),
        vocab=129280,
        groups=8,
        check=671.026,
    ),
    "kimi-k2": Shape(
        layers=61,
        dense=1,
        experts=384,
        top_k=8,
        hidden=7168,
        width=2048,
        dense_width=18432,
        shared_width=2048,
        attention=latent(64, 7168),
        vocab=163840,
        groups=8,
        check=1026.408,
    ),
}


# ------------------------------------------------------------------------------------------------------------ price lists
def other_tensors(shape: Shape) -> list[tuple[Unit, int]]:
    """Everything that gets a format beside the experts, with its row length."""
    found = []
    for layer in range(shape.layers):
        parts = list(shape.attention)
        for kind, width in (
            ("ffn", shape.dense_width if layer < shape.dense else 0),
            ("shexp", shape.shared_width if layer >= shape.dense else 0),
        ):
            suffix = "_shexp" if kind == "shexp" else ""
            if width:
                parts += [(f"ffn_{p}{suffix}", width, shape.hidden) for p in ("gate", "up")] + [(f"ffn_down{suffix}", shape.hidden, width)]
        found += [(Unit(name=f"blk.{layer}.{r}.weight", role=r, layer=layer, n_weights=rows * cols), cols) for r, rows, cols in parts]
    ends = [Unit(name=f"{r}.weight", role=r, layer=-1, n_weights=shape.vocab * shape.hidden) for r in ("token_embd", "output")]
    return found + [(unit, shape.hidden) for unit in ends]


def synthetic_costs(shape: Shape, form: str, seed: int = 0) -> Costs:
    """Prices with heavy tails: importance exp(N(0, 0.8)) of a layer, exp(N(0, 1.6)) of an expert, errors 4^-(bits - 1) exp(N(0, 0.25)).

    Dropping costs 0.7 importance exp(N(0, 0.6)), and 0.5 of a layer's importance times the square of the share that is gone on top.
    """
    rng = np.random.default_rng(seed)
    n_layers, n_experts = shape.layers - shape.dense, shape.experts
    importance = np.exp(rng.normal(0, 0.8, (n_layers, 1))) * np.exp(rng.normal(0, 1.6, (n_layers, n_experts))) / (n_layers * n_experts)
    drop = 0.7 * importance * np.exp(rng.normal(0, 0.6, importance.shape))
    share = np.arange(n_experts + 1) / n_experts
    curve = 0.5 * importance.sum(axis=1)[:, None] * share**2
    units, cols, weight = _expert_units(shape, form, importance)
    others = other_tensors(shape)
    units += [u for u, _ in others]
    cols += [c for _, c in others]
    counts = (n_experts,) if form == "experts" else offered_counts(n_experts, Router(top_k=shape.top_k))
    order = np.argsort(drop, axis=1)
    kept = np.argsort(order, axis=1)[None] >= n_experts - np.array(counts)[:, None, None]
    left = np.einsum("cle,le->cl", kept, importance) / importance.sum(axis=1)  # share of the layer's importance
    stacks = np.array([u.is_stack for u in units])
    layer_of = np.array([u.layer - shape.dense if u.is_stack else 0 for u in units])
    scale = np.where(stacks[None], left[:, layer_of], 1.0)  # [C, U]
    rest = 0.05 * importance.sum() / len(others) * np.exp(rng.normal(0, 1.0, len(others)))
    bits = np.array([FORMATS[f].bpw for f in WIDE])
    error = 4.0 ** -(bits - 1) * np.exp(rng.normal(0, 0.25, (len(units), len(WIDE))))
    cost = scale[:, :, None] * (np.concatenate([weight, rest])[:, None] * error)[None]
    size, staging = _sizes(shape, units, cols, counts)
    gone = np.take_along_axis(drop, order, axis=1).cumsum(axis=1)
    n_gone = n_experts - np.array(counts)
    drop_cost = np.where(n_gone[:, None] > 0, gone.T[n_gone - 1], 0.0) + curve.T[n_gone]
    factor = np.exp(rng.normal(0, 0.4, (len(DOMAINS), len(units))))
    usage = importance[None] * np.exp(rng.normal(0, 0.8, (len(DOMAINS), n_layers, n_experts)))
    return Costs(
        model="synthetic",
        model_name="synthetic",
        stats="",
        target="gguf",
        form=form,
        formats=WIDE,
        units=tuple(units),
        counts=counts,
        n_experts=n_experts,
        top_k=shape.top_k,
        kappa=0.0,
        memory=CONTEXT_BYTES,
        cold=(),
        domains=DOMAINS,
        domain_weights=(0.25,) * 4,
        cost=cost,
        input_cost=np.zeros(cost.shape),
        size=size,
        extra=np.zeros_like(size),
        staging=staging,
        fixed_size=np.full(len(counts), 10**7) + 4 * n_layers * shape.hidden * np.array(counts),
        factor=factor / factor.mean(axis=0),
        kept=kept,
        drop_cost=np.stack([drop_cost if form == "stacks" else np.zeros_like(drop_cost)] * 4),
        expert_drop=np.stack([drop] * 4),
        drop_curve=curve if form == "experts" else np.zeros_like(curve),
        usage=usage / usage.sum(axis=2, keepdims=True),
    )


def _expert_units(shape: Shape, form: str, importance: np.ndarray) -> tuple[list[Unit], list[int], np.ndarray]:
    """Units of the experts, row lengths and what their errors weigh."""
    layers, one = range(shape.dense, shape.layers), shape.width * shape.hidden
    if form == "experts":
        pairs = itertools.product(layers, range(shape.experts))
        units = [Unit(name=f"blk.{y}.ffn_exps.{e}", role="ffn_exps", layer=y, expert=e, n_weights=3 * one) for y, e in pairs]
        return units, [shape.hidden] * len(units), importance.ravel()
    parts = (("ffn_gate_exps", shape.hidden), ("ffn_up_exps", shape.hidden), ("ffn_down_exps", shape.width))
    units = [Unit(name=f"blk.{y}.{r}.weight", role=r, layer=y, n_weights=one * shape.experts) for y in layers for r, _ in parts]
    return units, [c for _ in layers for _, c in parts], np.repeat(importance.sum(axis=1) / 3, 3)


def _sizes(shape: Shape, units: Sequence[Unit], cols: Sequence[int], counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    size = np.zeros((len(counts), len(units), len(WIDE)), np.int64)
    staging = np.zeros_like(size)
    for u, unit in enumerate(units):
        for c, count in enumerate(counts):
            n = unit.n_weights * count // shape.experts if unit.is_stack else unit.n_weights
            for f, name in enumerate(WIDE):
                size[c, u, f] = pad(n // cols[u] * row_bytes(name, cols[u]))
                copied = unit.expert < 0 and is_repacked(name, unit.role, tied=False)
                staging[c, u, f] = staged_bytes(copied, int(size[c, u, f]), unit.role)
    return size, staging


# ------------------------------------------------------------------------------------------------------------------ cases
def make_rules(name: str, shape: Shape, costs: Costs, budget: int) -> list[Rule]:
    """The rules of a case."""
    if name == "active bytes":
        free = solve_plan(costs, budget, solver="lagrange")
        active = sum_units(costs, "active", range(len(costs.units))).value(costs, free)
        return [ActiveBytes(at_most=f"{int(ACTIVE * active)}B")]
    if name == "none":
        return []
    rng = np.random.default_rng(1)
    pins: list[Rule] = [
        Keep(layers=[int(rng.integers(shape.dense, shape.layers))], experts=(int(rng.integers(shape.experts)),)) for _ in range(PINS)
    ]
    return [*pins, GroupKept(groups=shape.groups, at_least=max(1, shape.experts // shape.groups // 4))]


def run_case(name: str, form: str, rules: str, solver: str) -> dict[str, Any]:
    """Plan once in this process: CPU seconds (those of CBC's process too), of them in the engine; peak bytes; gap."""
    shape = SHAPES[name]
    costs = synthetic_costs(shape, form)
    q8 = costs.size[-1, :, WIDE.index("Q8_0")].sum()
    budget = int(SHARE * q8) + sum(v for k, v in CONTEXT_BYTES.items() if k != "context")
    chosen = make_rules(rules, shape, costs, budget)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    inside = [0.0, 0]
    inner = ilp.run

    def timed(*arguments: Any, **options: Any) -> Any:
        began = cpu_seconds()
        outcome = inner(*arguments, **options)
        inside[0] += cpu_seconds() - began
        inside[1] += 1
        return outcome

    ilp.run = columns.run = timed
    import pulp  # noqa: F401 - not counted: a process that plans twice imports it once

    began, wall = cpu_seconds(), time.monotonic()
    plan: Plan = solve_plan(costs, budget, rules=chosen, solver=solver)
    end_child()  # only what has ended is counted
    spent = cpu_seconds() - began
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "seconds": spent,
        "engine": inside[0],
        "solves": inside[1],
        "wall": time.monotonic() - wall,
        "peak": peak * 1024,
        "before": before * 1024,
        "gap": plan.gap,
        "proven": plan.proven,
        "q": plan.q,
        "kept": sum(map(len, plan.kept)) / (len(plan.kept) * shape.experts),
    }


def cpu_seconds() -> float:
    """User and system time of this process and its children."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def run_child(case: tuple[str, str, str, str]) -> dict[str, Any] | str:
    """A case in a process of its own: its numbers, or why there are none."""
    command = [sys.executable, __file__, "--case", *case]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS, env={**os.environ, "OMP_NUM_THREADS": "1"})
    except subprocess.TimeoutExpired:
        return f"over {MOST_SECONDS} s"
    if done.returncode:
        return done.stderr.strip().splitlines()[-1].rpartition("Error: ")[2][:80]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table_row(case: tuple[str, str, str, str], found: dict[str, Any] | str) -> str:
    """A line of the table."""
    start = f"| {' | '.join(case)} | "
    if isinstance(found, str):
        return start + f"- | - | - | - | {found} | - |"
    build = found["seconds"] - found["engine"]
    gap = f"{100 * found['gap']:.4f} %{'' if found['proven'] else ' (not within 0.01 %)'}"
    numbers = f"{found['seconds']:.2f} | {build:.2f} | {found['engine']:.2f} ({found['solves']}) | {found['peak'] / 1e6:.0f} | {gap}"
    return start + f"{numbers} | {100 * found['kept']:.0f} % |"


def main() -> None:
    """Run the cases asked for and write the table."""
    parser = make_parser(__doc__)
    for option, known in (("shape", tuple(SHAPES)), ("form", FORMS), ("rules", RULES), ("solver", SOLVERS)):
        parser.add_argument(f"--{option}", nargs="+", choices=known, default=known)
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(*options.case)))
        return
    lines = [
        "# Planning time, Costs in memory -> Plan",
        "",
        f"{table.made_by('python benchmarks/planner.py', 'cores (one used)')}, "
        f"Python {platform.python_version()}; synthetic prices, {len(WIDE)} ggml types, budget {SHARE:.0%} of the size in Q8_0,",
        "asked gap 0.01 %.",
        "",
        "Seconds are CPU seconds, of CBC's process too; `numbers` is all that is not the engine (programs, relaxation, PuLP models), in",
        "brackets how many linear and integer programs were solved.  MB: peak of the process with the price list.",
        "",
        COLUMNS,
        "",
        *table.head(["shape", "form", "rules", "solver", "CPU s", "numbers", "engine", "MB", "proven gap", "experts kept"]),
    ]
    for case in itertools.product(options.shape, options.form, options.rules, options.solver):
        lines.append(table_row(case, run_child(case)))
        print(lines[-1], flush=True)
    if all(len(getattr(options, o)) > 1 for o in ("shape", "form", "rules", "solver")):
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
