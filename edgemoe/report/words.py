"""This module makes the words and numbers of a Plan or Report that terminal, page and model card share.

Every text of the model, the samples and the machine is untrusted.  It becomes one printable line here, and the caller that shows it escapes
it.
Sizes are bytes, KL is nats per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from edgemoe.ir import Plan, Report, TextScore, Unit
from edgemoe.targets import find_target

SURPRISE = 1.25  # measured over predicted KL from which pages say so
SMALL_KL = 1e-3  # nats below which they do not
GROUPS = {
    "ffn_exps": "experts",
    "ffn_gate_exps": "experts, gate",
    "ffn_up_exps": "experts, up",
    "ffn_down_exps": "experts, down",
    "token_embd": "embedding",
    "output": "output",
}
GROUP_ORDER = (*GROUPS.values(), "attention", "dense and shared", "router, norms, header")
REST = GROUP_ORDER[-1]
MEMORY_PARTS = {"weights": "weights", "kv": "KV", "compute": "compute", "output": "logits", "staging": "staging", "runtime": "runtime"}


def nats(value: float) -> str:
    """A KL or cost as text; what float64 adds up to in thousands of logits is no loss, and long."""
    if 0 < abs(value) < 1e-9:
        return "<1e-9"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


def billions(n_weights: int) -> str:
    """A number of weights as text."""
    return f"{n_weights / 1e9:.3g} billion" if n_weights >= 10**9 else f"{n_weights / 1e6:.3g} million"


def find_runs(ids: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, last) of each unbroken run."""
    groups = ([e for _, e in run] for _, run in groupby(enumerate(ids), key=lambda pair: pair[1] - pair[0]))
    return [(run[0], run[-1]) for run in groups]


def ranges(ids: Iterable[int], width: int = 0) -> str:
    """Numbers as text, "0-3 5 7-9"; cut after `width` characters if that is given."""
    text = " ".join(str(a) if a == b else f"{a}-{b}" for a, b in find_runs(ids))
    return text if not width or len(text) <= width else text[: width - 3].rsplit(" ", 1)[0] + " ..."


def dropping(plan: Plan, own_top_k: int = 0) -> str:
    """The causes of a plan's KL beside rounding, in words; `own_top_k` is the number of experts that the checkpoint's router picks."""
    paid = ["dropping experts", "cutting those that stay" if plan.width else "", "picking fewer" if plan.top_k < own_top_k else ""]
    return " and ".join(filter(None, paid))


def picks(plan: Plan, own_top_k: int = 0) -> str:
    """The number of experts that the router picks, and the checkpoint's number if that is larger."""
    return f"the router picks {plan.top_k}" + (f" instead of {own_top_k}" if plan.top_k < own_top_k else "")


def dropped_experts(plan: Plan, layer: int) -> list[int]:
    """Experts of a layer that the plan drops."""
    return sorted(set(range(plan.n_experts)) - set(plan.kept[layer]))


def kept_words(plan: Plan) -> str:
    """How many experts stay, in words."""
    if plan.has_one_count:
        return f"{plan.count} of {plan.n_experts} kept in each of {len(plan.kept)} layers"
    counts = [len(kept) for kept in plan.kept]
    mean = sum(counts) / len(counts)
    return f"{min(counts)} to {max(counts)} of {plan.n_experts} kept in each of {len(counts)} layers, {mean:.1f} on average"


def group_of(name: str) -> str:
    """The group of roles that a tensor is shown under."""
    role = "ffn_exps" if ".ffn_exps." in name else name.removesuffix(".weight").rsplit(".", 1)[-1]
    return GROUPS.get(role) or ("attention" if role.startswith("attn") else "dense and shared")


def kept_weights(unit: Unit, plan: Plan) -> int:
    """Weights of a unit that are left after the drop."""
    return unit.n_weights * plan.count // plan.n_experts if unit.is_stack else unit.n_weights


def mean_bits(units: Iterable[Unit], plan: Plan) -> float:
    """Bits per weight, scales and padding included."""
    pairs = [(plan.sizes[u.name], kept_weights(u, plan)) for u in units]
    return 8 * sum(s for s, _ in pairs) / max(sum(n for _, n in pairs), 1)


def shares_by_group(plan: Plan) -> dict[str, dict[str, int]]:
    """Bytes of the file by group of roles, then by format; `REST` holds the bytes outside all units."""
    shares: dict[str, dict[str, int]] = {group: {} for group in GROUP_ORDER}
    for name, size in plan.sizes.items():
        formats = shares[group_of(name)]
        formats[plan.formats[name]] = formats.get(plan.formats[name], 0) + size
    shares[REST][find_target(plan.target).words.plain] = plan.file_size - sum(plan.sizes.values())
    return {group: dict(sorted(formats.items())) for group, formats in shares.items() if sum(formats.values()) > 0}


def shares_by_format(plan: Plan) -> dict[str, int]:
    """Bytes by format over all units, largest first."""
    totals: dict[str, int] = {}
    for name, size in plan.sizes.items():
        totals[plan.formats[name]] = totals.get(plan.formats[name], 0) + size
    return dict(sorted(totals.items(), key=lambda pair: (-pair[1], pair[0])))


def allowed_size(plan: Plan) -> int:
    """Largest file that the budget allows: the budget less all memory of the process beside the file."""
    return plan.budget - (plan.memory["peak"] - plan.file_size + sum(plan.sizes[name] for name in plan.vram))


def agreement(report: Report) -> float:
    """Share of held-out tokens where both models have the same first choice."""
    return sum(s.top1_agreement * s.tokens for s in report.scores) / max(sum(s.tokens for s in report.scores), 1)


def proof(plan: Plan) -> str:
    """The proven bound of a plan, in words."""
    return f"proven by {plan.solver}" if plan.proven else f"not proven ({plan.solver})"


def bound_words(plan: Plan) -> str:
    """The distance of a plan from the best plan, in words; for a preset's plan it is not known."""
    if plan.gap >= 1:
        return f"none, nothing is proven of a plan that {plan.solver} made"
    return f"no plan costs less than {plan.bound:.6g}, gap {plan.gap:.3%}, {proof(plan)}"


def perplexities(score: TextScore) -> tuple[str, str]:
    """Perplexity of the original and of the artifact, as text."""
    return f"{score.original_perplexity:.3f}", f"{score.perplexity:.3f}"


def surprise(report: Report) -> str:
    """A sentence if the measured KL is clearly above the predicted one; the promise holds nevertheless."""
    expected = report.plan.predicted_kl
    if not report.scores or report.measured_kl < max(SURPRISE * expected, SMALL_KL):
        return ""
    return f"no promise is broken; the KL is {report.measured_kl / expected:.1f} times the predicted one" if expected > 0 else ""
