"""Two models that no 128 GB box holds, planned for one: GLM-5.2 beside the published hand-made prunings, and DeepSeek-V3 with 32k of context.

    python examples/headline.py [-o docs]

No weights are read.  GLM-5.2 is priced from what was published of it: saliency of every expert in ten domains (Dorijan10/glm-expert-pruning),
KLD of single tensors and of whole types (Thireus/GGUF-Tool-Suite).  DeepSeek-V3 is priced from other models, its experts are a stand-in.
Writes headline.md and headline.svg.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from edgemoe.base.errors import BudgetError
from edgemoe.base.storage import hash_json
from edgemoe.ir import Costs, Plan, Unit
from edgemoe.ir.memory import peak
from edgemoe.plan.infeasible import least_budget
from edgemoe.plan.solve import solve_plan
from edgemoe.price.priors import Saliency, load_saliency, price_config
from edgemoe.rules import ByteLimit, Drop, Keep, KeptCount, Rule

GIB, GB = 2**30, 10**9
# Dorijan10/glm-expert-pruning, README: keep list, kept experts, file GiB, perplexity ratio on code and on general text (measured by them)
PUBLISHED = (
    ("mix108_maxmin", 108, 100.32, 1.297, 1.645),
    ("mix108_uniform", 108, 100.32, None, None),
    ("code_108", 108, 100.32, 1.179, 2.786),
    ("code_96", 96, 90.72, 1.231, 3.283),
)
DENSE_GIB = 13.92  # of their files: what does not grow with the kept count


def mask_of(plan: Plan, shape: tuple[int, int]) -> np.ndarray:
    """Kept experts [L, E]."""
    mask = np.zeros(shape, bool)
    for row, kept in enumerate(plan.kept):
        mask[row, list(kept)] = True
    return mask


def budget_for(costs: Costs, file_bytes: float) -> int:
    """The budget whose weights may take so many bytes."""
    return round(file_bytes) + peak({**costs.memory, "weights": 0, "staging": 0})


def as_rules(kept: np.ndarray, layers: list[int], expert_gib: float) -> list[Rule]:
    """A published file as rules: its experts, and its bytes for them; types are free within, so it is priced no worse than it is."""
    rules: list[Rule] = [KeptCount(at_least=int(kept[0].sum()), at_most=int(kept[0].sum()), name="their count")]
    for row, layer in enumerate(layers):
        rules.append(Keep(layers=(layer,), experts=tuple(int(e) for e in np.flatnonzero(kept[row])), name=f"keep {layer}"))
        rules.append(Drop(layers=(layer,), experts=tuple(int(e) for e in np.flatnonzero(~kept[row])), name=f"drop {layer}"))
    return [*rules, ByteLimit(tensors=("experts",), at_most=f"{round(expert_gib * GIB)}B", name="their bytes for experts")]


def row_of(label: str, plan: Plan, coverage: np.ndarray) -> str:
    """One line of the GLM-5.2 table."""
    code = [v for d, v in plan.domain_q.items() if d.startswith("code")]
    general = [v for d, v in plan.domain_q.items() if not d.startswith("code")]
    cells = (f"{plan.file_size / GIB:.2f}", str(plan.count), f"{plan.q:.3f}", f"{np.mean(code):.3f}", f"{np.mean(general):.3f}")
    return f"| {label} | " + " | ".join((*cells, f"{max(plan.domain_q.values()):.3f}", f"{coverage.min():.3f}", f"{plan.gap:.4%}")) + " |"


def plan_glm(saliency: Saliency) -> tuple[list[str], list[tuple[str, float, float]]]:
    """GLM-5.2 at the bytes of the published files: the table, and points (label, GiB, nats) for the picture."""
    costs = price_config("GLM-5.2", 8192, also=[count for _, count, *_ in PUBLISHED])
    shape = saliency.share.shape[1:]
    lines = [
        "| plan | GiB | kept | nats, mean | code | general | worst domain | worst coverage | gap |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    points = []
    for name, count, gib, *_ in PUBLISHED:
        kept = saliency.kept[name]
        theirs = solve_plan(costs, budget_for(costs, gib * GIB), rules=as_rules(kept, costs.expert_layers, gib - DENSE_GIB))
        lines.append(row_of(f"published {name} (types re-chosen in its bytes)", theirs, domain_coverage(saliency.share, kept)))
        points.append((f"{name}, {count} kept", theirs.file_size / GIB, theirs.q))
    for label, objective in (("ours, mean of ten domains", "mean"), ("ours, worst domain", "worst")):
        plan = solve_plan(costs, budget_for(costs, 100.32 * GIB), objective=objective)
        lines.append(row_of(label, plan, domain_coverage(saliency.share, mask_of(plan, shape))))
    for gib in (80, 90, 100.32, 110, 118, 130):
        plan = solve_plan(costs, budget_for(costs, gib * GIB))
        points.append(("ours", plan.file_size / GIB, plan.q))
    return lines, points


def domain_coverage(saliency: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """How much of each domain's saliency the kept sets hold, of what its own best sets of that size would hold [D].

    Args:
        saliency: [D, L, E], in any unit that is the same within a layer; layers count alike.
        kept: [L, E].
    """
    share = saliency / np.maximum(saliency.sum(axis=2, keepdims=True), 1e-300)
    best = np.cumsum(-np.sort(-share, axis=2), axis=2)
    most = np.take_along_axis(best, np.broadcast_to(kept.sum(axis=1)[None, :, None] - 1, (*share.shape[:2], 1)), axis=2)[:, :, 0]
    coverage: np.ndarray = ((share * kept).sum(axis=2) / np.maximum(most, 1e-300)).mean(axis=1)
    return coverage


def price_coverage(saliency: Saliency, count: int) -> Costs:
    """Costs in lost coverage instead of nats, so that the objective "worst" maximises the least covered domain's coverage.

    The coverage of a domain is the share of its saliency that is kept, relative to its own best `count` experts, mean over layers
    (domain_coverage).  Nothing but experts is decided: every layer keeps `count`, and there is one tensor of one byte.

    Args:
        saliency: shares [D, L, E].
        count: kept experts of each layer.
    """
    share = saliency.share
    domains, n_layers, n_experts = share.shape
    best = np.sort(share, axis=2)[:, :, -count:].sum(axis=2, keepdims=True)
    price = share / best / n_layers
    kept = np.argsort(np.argsort(-price.mean(axis=0), axis=1, kind="stable"), axis=1) < count
    lost = (1 / n_layers - (price * kept).sum(axis=2)).clip(min=0.0)  # [D, L]; the domain's own best set loses nothing
    stack = [
        Unit(name=f"blk.{layer}.ffn_down_exps.weight", role="ffn_down_exps", layer=layer, n_weights=n_experts) for layer in range(n_layers)
    ]
    shape = 1, n_layers, 1
    return Costs(
        model=hash_json("coverage", share.shape),
        model_name="coverage",
        stats="",
        target="gguf",
        form="stacks",
        formats=("F16",),
        units=tuple(stack),
        counts=(count,),
        n_experts=n_experts,
        top_k=1,
        kappa=0.0,
        memory={"context": 0, "kv": 0, "compute": 0, "output": 0, "runtime": 0},
        cold=(),
        domains=saliency.domains,
        domain_weights=tuple(float(1 / domains) for _ in range(domains)),
        origin="lost coverage, not nats",
        cost=np.zeros(shape),
        input_cost=np.zeros(shape),
        size=np.ones(shape, np.int64),
        extra=np.zeros(shape, np.int64),
        staging=np.zeros(shape, np.int64),
        fixed_size=np.zeros(1, np.int64),
        factor=np.ones((domains, n_layers)),
        kept=kept[None],
        drop_cost=lost[:, None, :],
        expert_drop=price,
        drop_curve=np.zeros((n_layers, n_experts + 1)),
        usage=share,
    )


def cover_glm(saliency: Saliency) -> list[str]:
    """The same 108 experts of each layer chosen for coverage alone, as the published list was."""
    lines = ["| keep list, 108 of 256 | worst coverage | mean |", "|---|---|---|"]
    for name in ("code_108", "mix108_uniform", "mix108_maxmin"):
        found = domain_coverage(saliency.share, saliency.kept[name])
        lines.append(f"| published {name} | {found.min():.4f} | {found.mean():.4f} |")
    plan = solve_plan(price_coverage(saliency, 108), GB, objective="worst", gap=1e-3)
    found = domain_coverage(saliency.share, mask_of(plan, saliency.share.shape[1:]))
    return [*lines, f"| ours, objective worst (no list can exceed {1 - plan.bound:.4f}) | {found.min():.4f} | {found.mean():.4f} |"]


def plan_deepseek() -> list[str]:
    """DeepSeek-V3 with 32k of context: what each budget buys, where the bytes are, and what is impossible."""
    costs = price_config("DeepSeek-V3", 32768)
    everyone = [KeptCount(at_least=costs.n_experts, name="keep every expert")]
    least = least_budget(costs, everyone)
    lines = [
        f"The KV cache takes {costs.memory['kv'] / GB:.2f} GB at 32,768 tokens. With every expert kept in the smallest ggml types, the process takes "
        f"{(least or 0) / GB:.1f} GB, so no choice of types alone fits",
        f"a box of 128 GB. The smallest process with drops takes {(least_budget(costs) or 0) / GB:.1f} GB.",
        "",
        "| budget GB | kept | mean bits of experts | experts GB | attention GB | rest GB | nats predicted | of it dropping | without drops |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for gb in (103, 118, 128):
        plan = solve_plan(costs, gb * GB)
        experts = sum(s for n, s in plan.sizes.items() if "_exps" in n)
        attention = sum(s for n, s in plan.sizes.items() if ".attn" in n)
        weights = sum(u.n_weights for u in costs.units if u.is_stack) * plan.count / costs.n_experts
        try:
            without = f"{solve_plan(costs, gb * GB, rules=everyone).q:.3f}"
        except BudgetError:
            without = "does not fit"
        cells = (
            f"{8 * experts / weights:.2f}",
            f"{experts / GB:.1f}",
            f"{attention / GB:.1f}",
            f"{(plan.file_size - experts - attention) / GB:.1f}",
        )
        lines.append(f"| {gb} | {plan.count} of 256 | " + " | ".join(cells) + f" | {plan.q:.3f} | {plan.drop_q:.3f} | {without} |")
    return lines


def draw(points: list[tuple[str, float, float]]) -> str:
    """Nats against GiB as SVG: our plans a line, published files dots."""
    width, height, left, top, bottom = 720, 380, 60, 36, 46
    sizes, nats = [p[1] for p in points], [p[2] for p in points]
    low, high, most = min(sizes) - 3, max(sizes) + 12, max(nats) * 1.08

    def at(size: float, value: float) -> tuple[float, float]:
        return left + (size - low) / (high - low) * (width - left - 20), height - bottom - value / most * (height - top - bottom)

    title = "GLM-5.2 in the memory of a 128 GB box: predicted nats per token at equal bytes"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="12" fill="#374151">',
        f'<rect width="{width}" height="{height}" fill="#fff"/><text x="{left}" y="20" font-size="14">{title}</text>',
        f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">file size, GiB</text>',
    ]
    for tick in range(int(low / 10) * 10 + 10, int(high) + 1, 10):
        out.append(f'<text x="{at(tick, 0)[0]:.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick}</text>')
    for step in range(6):
        x, y = at(low, most * step / 5)
        out.append(f'<line x1="{left}" x2="{width - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        out.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{most * step / 5:.2f}</text>')
    ours = sorted((s, v) for label, s, v in points if label == "ours")
    path = " ".join("{:.1f},{:.1f}".format(*at(s, v)) for s, v in ours)
    out.append(f'<polyline points="{path}" fill="none" stroke="#1d4ed8" stroke-width="2.5"/>')
    for label, size, value in points:
        x, y = at(size, value)
        colour = "#1d4ed8" if label == "ours" else "#c2410c"
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>')
        if label != "ours":
            crowded = any(other != label and s == size and 0 < v - value < most / 15 for other, s, v in points)
            out.append(f'<text x="{x + 8:.1f}" y="{y + (14 if crowded else 0):.1f}">{label}</text>')
    x, y = at(*ours[-1])
    return "\n".join([*out, f'<text x="{x - 30:.1f}" y="{y - 10:.1f}" fill="#1d4ed8" font-weight="600">edgemoe</text></svg>']) + "\n"


def main() -> None:
    """Plan everything, write the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"))
    options = parser.parse_args()
    saliency = load_saliency()
    glm, points = plan_glm(saliency)
    parts = [
        "# Two models that no 128 GB box holds\n",
        "`python examples/headline.py` makes this page. It downloads and runs nothing: the plans below have generic prices (`docs/pricing.md`, 8). Nats are",
        "the predicted KL per token against the original.\n",
        "## GLM-5.2 (743 billion weights)\n",
        "The prices come from the published measurements of this model: expert saliency in ten domains, KLD of single tensors, and KLD by type. The published",
        "files copy the bytes of the kept experts from a 2.65-bit file. We price each of them with its own experts and with the best types for its bytes,",
        "so its price here is never above that of the published types.\n",
        *glm,
        "\n![nats against GiB](headline.svg)\n",
        "The author of the published lists maximised coverage alone. With coverage as the only objective, the same program finds:\n",
        *cover_glm(saliency),
        "\n## DeepSeek-V3 (671 billion weights), 32k of context\n",
        "The prices come from other models, with GLM-5.2's experts as a stand-in, because no expert counts of V3 are public. The bytes are exact, and the nats",
        "are a guess.\n",
        *plan_deepseek(),
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "headline.md").write_text("\n".join(parts) + "\n", encoding="utf-8")
    (options.output / "headline.svg").write_text(draw(points), encoding="utf-8")
    print("\n".join(parts))


if __name__ == "__main__":
    main()
