"""This module measures a plan's KL on calibration text, rescales the prices by it, and solves again (docs/pricing.md, 13).

A plan predicts two sums, the cost of its drops and the cost of its formats.  The drops are measured by running the original with the kept
experts only, and the whole by running the artifact.  Each sum is scaled to its measurement, and the program is solved again.  Every
measurement is kept in the work folder, rounded, so that a rerun chooses the same plans.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.progress import Progress
from edgemoe.base.storage import load_sealed, save_sealed
from edgemoe.base.types import F32, F64
from edgemoe.base.work import key_of, open_or_make, path_of
from edgemoe.ir import Costs, Model, Plan, Round, Stats
from edgemoe.pipeline.emit import emit_artifact
from edgemoe.plan.evaluate import price_choice
from edgemoe.stream.texts import DEFAULT_TOKENS, Text, text_weights
from edgemoe.stream.windows import WINDOW
from edgemoe.targets import Target
from edgemoe.verify.logits import compare_logits, kl_of_rows, reference_states

if TYPE_CHECKING:
    from edgemoe.stream.windows import Windows

MEASURE_TOKENS = 16_384
BEYOND = 7 * DEFAULT_TOKENS  # tokens behind the calibrated ones, of all texts together, among which the measuring text is chosen
SKIP, EVERY = 3, 7  # the guard windows of a text: every GUARD_EVERY-th of repair/two_streams.py, the first at half of this distance
# UNSEEN is KL on held-out text over KL on windows among fitted ones, whose documents refits and feedback have learned.  The others are
# standard deviations of logarithms, of predictions and between texts.  All come from 14 files of the bundled models (docs/pricing.md, 13).
UNSEEN = 1.4
OFF = 0.2
TEXTS = 0.1
DIGITS = 3  # significant digits of a measured KL that are used, so that the last bits of another processor choose no other plan
LEAST_SHARE = 0.1  # share of a plan's cost that drops or formats must have to get a factor other than the whole's
MOST = 4.0  # the largest ratio between the formats' factor and the whole's


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """KL of a plan, and KL of its omissions alone (dropped, narrower or fewer active experts), in nats per token.

    `error` is the standard error of `kl` over windows, as a share of `kl`.
    """

    kl: float
    drop_kl: float
    error: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """The best measured plan, prices that agree with its measurement, and the findings of every round."""

    plan: Plan
    costs: Costs
    rounds: tuple[Round, ...]


def refine_plan(costs: Costs, plan: Plan, rounds: int, solve: Callable[[Costs], Plan], measure: Callable[[Plan], Measured]) -> Refined:
    """Measure, rescale and solve again, at most `rounds` times or until the plan stays the same; return the best measured plan.

    Args:
        costs: the prices that `plan` was made from.
        plan: the first plan.
        rounds: how often to solve again; the last plan is measured too, if it is new.
        solve: makes a plan from prices.
        measure: runs a plan, and gives the expected KL on unseen text.
    """
    log: list[Round] = []
    found: list[tuple[float, Plan, Costs, Plan]] = []  # KL, the plan, prices that agree with this KL, and the best plan by these prices
    while True:
        seen = measure(plan)
        before, costs = costs, rescale(costs, plan, seen)
        log.append(_note(plan, seen, before, costs))
        following = solve(costs)
        found.append((seen.kl, plan, costs, following))
        if len(log) > rounds or any(_same(following, known) for _, known, *_ in found):
            break
        plan = following
    _, best, prices, optimum = min(found, key=lambda f: f[0])
    final = optimum if _same(best, optimum) else _reprice(best, prices, optimum)
    return Refined(plan=final, costs=prices, rounds=tuple(log))


def rescale(costs: Costs, plan: Plan, seen: Measured) -> Costs:
    """Rescale prices so that the predictions for the plan and for its drops alone equal the measurements.

    With s = measured / predicted KL of the whole, costs grow by s and kappa by sqrt(s), since KL = Q + kappa sqrt(Q).  Of the new sum, the
    drops take their measured cost and the formats take the rest.
    """
    whole = max(seen.kl, 1e-12) / max(plan.predicted_kl, 1e-12)
    drop, rounding = whole, whole
    formats_q = plan.q - plan.drop_q
    if min(plan.drop_q, formats_q) > LEAST_SHARE * plan.q and 0 < seen.drop_kl < seen.kl:
        drop = seen.drop_kl / costs.predict_kl(plan.drop_q)
        rounding = float(np.clip((whole * plan.q - drop * plan.drop_q) / formats_q, whole / MOST, whole * MOST))
        drop = (whole * plan.q - rounding * formats_q) / plan.drop_q
    return replace(
        costs,
        cost=costs.cost * rounding,
        input_cost=costs.input_cost * rounding,
        drop_cost=costs.drop_cost * drop,
        expert_drop=costs.expert_drop * drop,
        drop_curve=costs.drop_curve * drop,
        kappa=costs.kappa * math.sqrt(whole),
    )


def expect(plan: Plan, seen: Measured, fitted: float) -> Measured:
    """Expected KL on unseen text: a weighted mean, in logarithms, of predicted and measured KL.

    The measurement counts less the more it scatters, by the inverse of its variance beside the prediction's.  It scatters where few tokens
    hold most of the KL (flipped routing).  The part that was fitted to the measured documents is multiplied by UNSEEN, because it costs so
    much more on other documents.

    Args:
        plan: with the prediction.
        seen: the measurement on the measuring text.
        fitted: share of the plan's Q that refits and feedback have lowered, times the share of the measuring text that lies among fitted
            windows (`Measurer.among`).
    """
    unseen = 1 + (UNSEEN - 1) * fitted
    trust = OFF**2 / (OFF**2 + TEXTS**2 + seen.error**2)
    predicted = max(plan.predicted_kl, 1e-12)
    kl = predicted * (unseen * max(seen.kl, 1e-12) / predicted) ** trust
    return Measured(kl=kl, drop_kl=kl * seen.drop_kl / max(seen.kl, 1e-12))


def fitted_share(plan: Plan, costs: Costs, rounding: str) -> float:
    """The share of a plan's Q that was lowered on calibration text: repaired drops, and formats rounded with feedback.

    The rounding of inputs in kernels is never fitted.
    """
    c = costs.counts.index(plan.count) if costs.form == "stacks" else 0
    names = {unit.name: u for u, unit in enumerate(costs.units)}
    of_inputs = sum(float(costs.input_cost[c, names[name], costs.formats.index(fmt)]) for name, fmt in plan.formats.items())
    formats = max(plan.q - plan.drop_q - of_inputs, 0.0) if rounding == "feedback" else 0.0
    return (formats + plan.drop_q * plan.repair) / max(plan.q, 1e-300)


def _note(plan: Plan, seen: Measured, before: Costs, after: Costs) -> Round:
    """One line of the report's table, with the factors of this round."""
    return Round(
        predicted=plan.predicted_kl,
        expected=seen.kl,
        predicted_drops=before.predict_kl(plan.drop_q),
        expected_drops=seen.drop_kl,
        count=plan.count,
        file_size=plan.file_size,
        drop_factor=_ratio(after.expert_drop, before.expert_drop),
        format_factor=_ratio(after.cost, before.cost),
    )


def _ratio(after: F64, before: F64) -> float:
    finite = np.isfinite(before) & (before > 0)
    return float(after[finite][0] / before[finite][0]) if finite.any() else 1.0


def _same(a: Plan, b: Plan) -> bool:
    return (a.kept, a.formats) == (b.kept, b.formats)


def _reprice(plan: Plan, costs: Costs, optimum: Plan) -> Plan:
    """Describe a plan at other prices, with the bound of `optimum`, the best plan by these prices, which was measured to be worse."""
    c = costs.counts.index(plan.count) if costs.form == "stacks" else 0
    stored = np.array([u for u, unit in enumerate(costs.units) if unit.name in plan.formats])
    chosen = np.array([costs.formats.index(plan.formats[costs.units[u].name]) for u in stored])
    kept = np.zeros(costs.kept.shape[1:], bool)
    for row, experts in enumerate(plan.kept):
        kept[row, list(experts)] = True
    domains, drop = price_choice(costs, c, kept, stored, chosen)
    q = float(costs.weights @ domains)
    worst = q if plan.objective == "mean" else float(domains.max())
    return replace(
        plan,
        q=q,
        drop_q=float(costs.weights @ drop),
        predicted_kl=costs.predict_kl(q),
        domain_q={name: float(v) for name, v in zip(costs.domains, domains, strict=True)},
        bound=min(optimum.bound, worst),
        gap=max(0.0, 1 - optimum.bound / max(worst, 1e-300)),
        proven=False,
        price=optimum.price,
    )


# -------------------------------------------------------------------------------------------------------------- measuring
class Measurer:
    """Runs plans on the measuring text, and reads earlier measurements from the work folder.

    `among` is the share of the measuring text, by the texts' weights, that lies among fitted windows.
    """

    def __init__(
        self,
        model: Model,
        stats: Stats,
        texts: Sequence[Text],
        target: Target,
        work: Path,
        *,
        max_tokens: int,
        stored_as: Callable[..., Model],
        rounding: str,
        progress: Progress | None = None,
    ) -> None:
        """Choose the text.

        Args:
            model: the original.
            stats: what calibration saw.
            texts: calibration texts.
            target: what plans are written as.
            work: folder for weights, files and measurements.
            max_tokens: of the texts together, as in calibration.
            stored_as: makes the weights of a plan, by `rounding` or by the rounding that is given beside the plan.
            rounding: how `stored_as` rounds.
            progress: called with (plans measured, plans measured).
        """
        self.model, self.stats, self.texts, self.target, self.work, self.stored_as = model, stats, texts, target, work, stored_as
        self.rounding = rounding
        self.windows, among = measuring_windows(model, texts, max_tokens)
        self.among = float(text_weights(texts)[among].sum())
        self.progress = progress
        self.done = 0

    def __call__(self, plan: Plan) -> Measured:
        """KL of the plan and of its drops on the measuring text."""
        made_from = (self.model.fingerprint, self.stats.key, self.windows.tokens.tolist(), plan.target, self.rounding)
        path = path_of(self.work, "measured", key_of("measured", made_from, plan.kept, plan.formats, plan.repair), ".json")

        def make() -> Measured:
            found = self._measure(plan, path.with_suffix(""))
            save_sealed(path, asdict(found))
            return found

        measured = open_or_make(path, lambda: Measured(**load_sealed(path)) if path.exists() else None, make)
        self.done += 1
        if self.progress:
            self.progress(self.done, self.done)
        return measured

    def _measure(self, plan: Plan, folder: Path) -> Measured:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        original, n = reference_states(self.model, self.windows, self.work), len(self.windows.tokens)
        stored = self.stored_as(plan)
        try:
            artifact = emit_artifact(stored, self.stats, plan, self.target, folder)
            alone = replace(self.windows, domain=np.arange(n))  # a text for each window: their scatter says how reliable the mean is
            names, settings = [str(i) for i in range(n)], self.target.runs.compared
            scores = compare_logits(artifact.path, self.model, alone, original, names, self.target, settings=settings)
            kl, error = self._mean([s.kl_mean for s in scores])
            drop_kl, _ = self._mean(self._drops(plan, original, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return Measured(kl=_rounded(kl), drop_kl=_rounded(drop_kl), error=_rounded(error / max(kl, 1e-12)))

    def _mean(self, windows: Sequence[float]) -> tuple[float, float]:
        """Mean KL over texts by weight, and its standard error over windows."""
        kl, weights = np.array(windows), text_weights(self.texts)
        mean, variance = 0.0, 0.0
        for d in np.unique(self.windows.domain):
            mine = kl[self.windows.domain == d]
            mean += weights[d] * float(mine.mean())
            variance += weights[d] ** 2 * float(mine.var(ddof=1)) / len(mine) if len(mine) > 1 else 0.0
        return mean, math.sqrt(variance)

    def _drops(self, plan: Plan, original: F32, folder: Path) -> list[float]:
        """KL in each window of the kept experts, repaired and not rounded, run one layer at a time; 0 if nothing is left out."""
        from edgemoe.stream.passes import final_states, open_head

        stored = self.stored_as(plan, "stock")
        if stored is self.model and all(len(kept) == self.model.n_experts for kept in plan.kept):
            return [0.0] * len(original)
        changed = final_states(stored, self.windows, folder, kept=plan.kept)
        with open_head(self.model) as head:
            each = enumerate(self.windows.lengths)
            return [float(kl_of_rows(head(original[i])[:n], head(changed[i])[:n]).mean()) for i, n in each]


def measuring_windows(model: Model, texts: Sequence[Text], max_tokens: int) -> tuple[Windows, NDArray[np.bool_]]:
    """Windows of the calibration texts to which no repair was fitted, the same number from each text; never held-out text.

    A text gives evenly spaced windows behind its calibrated tokens, which usually means other documents.  A text that ends before gives the
    guard windows that repair set aside.

    Returns:
        The windows, and for each text whether its windows lie among fitted ones.
    """
    from edgemoe.stream.windows import tokenize

    windows = tokenize(model, texts, max_tokens + BEYOND, WINDOW)
    each = max(1, round(MEASURE_TOKENS / WINDOW / len(texts)))
    fitted = math.ceil(max_tokens / len(texts) / windows.tokens.shape[1])
    chosen, among = [], np.zeros(len(texts), bool)
    for d in range(len(texts)):
        mine = np.flatnonzero(windows.domain == d)
        among[d] = len(mine) < fitted + each
        beyond, seen = mine[fitted:], mine[:fitted]
        pool = beyond if not among[d] else seen[SKIP::EVERY] if len(seen) > SKIP else seen[-1:]
        chosen.append(pool[np.linspace(0, len(pool) - 1, min(each, len(pool))).round().astype(int)])
    return windows.take(np.sort(np.concatenate(chosen))), among


def _rounded(kl: float) -> float:
    return float(f"{kl:.{DIGITS}g}")
