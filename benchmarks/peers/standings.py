"""Standings say which of the measured files wins where, as Markdown tables.

At each of our files a peer stands with its smallest file that is not smaller, or, where it searches for a size itself, with what it made
for the same budget; of each class the best counts.  A difference below the noise floor, or below two standard errors over the same windows,
is a tie.  A peer that does not come down to our size stands with a larger file: its bytes over ours are told, and a second count takes only
those that have at most a tenth more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import table
from measure import Reference, Score, mean_and_error

from edgemoe.base.types import F64
from peers.jobs import CLASSES, SEARCHES

NEAR = 1.1  # times our bytes: the second count
SURE = 2.0  # standard errors of the paired difference
WIN, TIE, LOSS = "win", "tie", "LOSS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A peer's measured file."""

    kind: str
    recipe: str
    name: str
    score: Score
    budget: int = -1

    @property
    def label(self) -> str:
        """Recipe, name and megabytes."""
        return f"{self.recipe}, {self.name}, {self.score.size / 1e6:.2f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """A file of ours: which budget it was made for, what stays, what was promised."""

    budget: int
    count: int
    predicted: float
    score: Score


def kl_of(held: Reference, score: Score, domains: Sequence[int]) -> list[F64]:
    """KL of the windows, by domain."""
    parts = held.split(score.kl)
    return [parts[d] for d in domains]


def best_of(held: Reference, peers: Sequence[Entry], kind: str, ours: Ours, domains: Sequence[int]) -> Entry | None:
    """What the best recipe of a class puts beside one of our files (random drops: the middle of the seeds), by KL on these domains."""
    standing = []
    for recipe in sorted({p.recipe for p in peers if p.kind == kind}):
        fits = [p for p in peers if (p.kind, p.recipe) == (kind, recipe) and (p.budget == ours.budget or _is_no_smaller(p, ours))]
        if fits:
            standing.append(min(fits, key=lambda p: (p.budget != ours.budget, p.score.size)))
    standing.sort(key=lambda p: mean_and_error(kl_of(held, p.score, domains))[0])
    if kind != "random":
        return standing[0] if standing else None
    shares = [[p for p in standing if p.recipe.endswith(share)] for share in sorted({p.recipe.split(" ", 1)[1] for p in standing})]
    middles = [group[len(group) // 2] for group in shares]
    return min(middles, key=lambda p: mean_and_error(kl_of(held, p.score, domains))[0]) if middles else None


def _is_no_smaller(peer: Entry, ours: Ours) -> bool:
    return peer.budget < 0 and peer.score.size >= ours.score.size


def verdict(held: Reference, ours: Score, peer: Score, domains: Sequence[int], floor: float) -> tuple[str, float, float]:
    """Win, tie or LOSS; the difference ours - peer in nats and its standard error, paired by window."""
    pairs = zip(kl_of(held, ours, domains), kl_of(held, peer, domains), strict=True)
    difference, error = mean_and_error([a - b for a, b in pairs])
    if abs(difference) <= max(floor, SURE * error):
        return TIE, difference, error
    return (WIN if difference < 0 else LOSS), difference, error


def noise_floor(held: Reference, peers: Sequence[Entry]) -> float:
    """KL of the F16 file."""
    return next(mean_and_error(held.split(p.score.kl))[0] for p in peers if p.kind == "16-bit")


def kinds() -> tuple[str, ...]:
    """All classes of peers."""
    return CLASSES + SEARCHES


def best_peer(held: Reference, peers: Sequence[Entry], ours: Ours, domains: Sequence[int], most: float = np.inf) -> Entry | None:
    """The best of all classes, of those whose file has at most `most` times our bytes."""
    fits = [p for p in peers if p.score.size <= most * ours.score.size]
    found = [p for kind in kinds() if (p := best_of(held, fits, kind, ours, domains))]
    return min(found, key=lambda p: mean_and_error(kl_of(held, p.score, domains))[0]) if found else None


# ------------------------------------------------------------------------------------------------------------------- tables
def main_table(held: Reference, ours: Sequence[Ours], peers: Sequence[Entry], n_experts: int) -> list[str]:
    """Ours beside the best of all peers, at every budget."""
    head = ["file MB", "kept", "predicted", "KL", "p99", "top-1", "perplexity", "worst domain"]
    head += ["best peer", "its bytes / ours", "its KL", "ours - it", "ours / it", ""]
    lines = table.head(head)
    lines += [table.row(_own_cells(held, row, n_experts) + _peer_cells(held, row, peers)) for row in ours]
    return [*lines, "", f"All peers: {count(held, ours, peers)}.  Of {NEAR - 1:.0%} more bytes at most: {count(held, ours, peers, NEAR)}."]


def _own_cells(held: Reference, row: Ours, n_experts: int) -> list[str]:
    parts, mean = held.split(row.score.kl), mean_and_error(held.split(row.score.kl))
    worst = max(range(len(parts)), key=lambda d: parts[d].mean())
    cells = [f"{row.score.size / 1e6:.2f}", f"{row.count} of {n_experts}", f"{row.predicted:.3g}", f"**{mean[0]:.3g}** ± {mean[1]:.1g}"]
    cells += [f"{np.mean(row.score.p99):.3g}", f"{np.mean([p.mean() for p in held.split(row.score.same)]):.1%}"]
    return [*cells, f"{held.perplexity(row.score, range(len(parts))):.2f}", f"{parts[worst].mean():.3g} ({held.names[worst]})"]


def _peer_cells(held: Reference, row: Ours, peers: Sequence[Entry]) -> list[str]:
    every = range(len(held.names))
    peer = best_peer(held, peers, row, every)
    if peer is None:
        return ["none", "-", "-", "-", "-", "no peer"]
    mark, difference, spread = verdict(held, row.score, peer.score, every, noise_floor(held, peers))
    mine, theirs = (mean_and_error(held.split(s.kl))[0] for s in (row.score, peer.score))
    bytes_ = f"{peer.score.size / row.score.size:.2f}"
    return [f"{peer.kind} ({peer.label})", bytes_, f"{theirs:.3g}", f"{difference:+.3g} ± {spread:.1g}", f"{mine / theirs:.2f}", mark]


def count(held: Reference, ours: Sequence[Ours], peers: Sequence[Entry], most: float = np.inf) -> str:
    """How many budgets are won, tied and lost, and the geometric mean of ours over the best peer."""
    every, floor = range(len(held.names)), noise_floor(held, peers)
    pairs = [(row, peer) for row in ours if (peer := best_peer(held, peers, row, every, most))]
    marks = [verdict(held, row.score, peer.score, every, floor)[0] for row, peer in pairs]
    ratios = [mean_and_error(held.split(r.score.kl))[0] / mean_and_error(held.split(p.score.kl))[0] for r, p in pairs]
    told = ", ".join(f"{marks.count(mark)} {mark}" for mark in (WIN, TIE, LOSS))
    mean = f", geometric mean of ours / best peer {float(np.exp(np.mean(np.log(ratios)))):.2f}" if ratios else ""
    return f"{told}, {len(ours) - len(pairs)} without a peer{mean}"


def class_table(held: Reference, ours: Sequence[Ours], peers: Sequence[Entry]) -> list[str]:
    """Ours beside the best of each class: its KL, and win, tie or LOSS."""
    every, floor = range(len(held.names)), noise_floor(held, peers)
    lines = table.head(["file MB", "ours", *kinds()])
    for row in ours:
        cells = []
        for kind in kinds():
            peer = best_of(held, peers, kind, row, every)
            mark = peer and verdict(held, row.score, peer.score, every, floor)[0]
            cells.append(f"{mean_and_error(held.split(peer.score.kl))[0]:.3g} ({peer.label}) {mark}" if peer else "-")
        lines.append(table.row([f"{row.score.size / 1e6:.2f}", f"{mean_and_error(held.split(row.score.kl))[0]:.3g}", *cells]))
    return lines


def domain_table(held: Reference, ours: Sequence[Ours], peers: Sequence[Entry]) -> list[str]:
    """Ours beside the peer that is best in each domain."""
    floor = noise_floor(held, peers)
    lines = table.head(["file MB", *held.names])
    for row in ours:
        cells = []
        for d in range(len(held.names)):
            peer = best_peer(held, peers, row, [d])
            mark = peer and verdict(held, row.score, peer.score, [d], floor)[0]
            theirs = f"{kl_of(held, peer.score, [d])[0].mean():.3g} ({peer.kind}) {mark}" if peer else "no peer"
            cells.append(f"{kl_of(held, row.score, [d])[0].mean():.3g} / {theirs}")
        lines.append(table.row([f"{row.score.size / 1e6:.2f}", *cells]))
    return lines


def seed_table(held: Reference, runs: Sequence[tuple[int, Sequence[Ours], Sequence[Entry]]]) -> list[str]:
    """Ours and the best mix at each budget, for each slice of the calibration text."""
    every = range(len(held.names))
    head = [f"{who}, seed {seed}" for seed, _, _ in runs for who in ("ours", "best mix")]
    lines = table.head(["budget", *head])
    for i in range(len(runs[0][1])):
        cells = []
        for _, ours, peers in runs:
            peer = best_of(held, peers, "mix", ours[i], every)
            cells.append(f"{mean_and_error(held.split(ours[i].score.kl))[0]:.3g}")
            cells.append(f"{mean_and_error(held.split(peer.score.kl))[0]:.3g} ({peer.name})" if peer else "-")
        lines.append(table.row([str(i), *cells]))
    return lines


def task_table(
    held: Reference, tasks: Sequence[tuple[tuple[str, ...], Sequence[Ours]]], general: Sequence[Ours], peers: Sequence[Entry]
) -> list[str]:
    """Plans calibrated on a task's text, on held-out text of the same task: beside our general plan and the best peer there."""
    floor = noise_floor(held, peers)
    head = ["task", "file MB", "kept", "task plan", "general plan", "", "best peer there", ""]
    lines = table.head(head)
    for names, ours in tasks:
        domains = [held.names.index(name) for name in names]
        for row in ours:
            plain = next(g for g in general if g.budget == row.budget)
            peer = best_peer(held, peers, row, domains)
            cells = [" + ".join(names), f"{row.score.size / 1e6:.2f}", str(row.count)]
            cells.append("**{:.3g}** ± {:.1g}".format(*mean_and_error(kl_of(held, row.score, domains))))
            cells.append(f"{mean_and_error(kl_of(held, plain.score, domains))[0]:.3g}")
            cells.append(verdict(held, row.score, plain.score, domains, floor)[0])
            if peer:
                cells.append(f"{mean_and_error(kl_of(held, peer.score, domains))[0]:.3g} ({peer.kind}: {peer.label})")
                cells.append(verdict(held, row.score, peer.score, domains, floor)[0])
            lines.append(table.row(cells + [""] * (len(head) - len(cells))))
    return lines
