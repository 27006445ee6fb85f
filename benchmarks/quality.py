"""This script compares our builds with what people do today, at equal bytes, all measured in llama.cpp on the same held-out text.

    python benchmarks/quality.py examples/tiny-moe [--work DIR] [--tokens 10240] [--seeds 0 1]

Peers, every file with our importance matrix: one ggml type; llama-quantize's mixes; drops by lot, frequency, REAP (published mean, and
sum) times those mixes; PMQ and CC-MoE as far as a GGUF can hold them; the tiers of APEX; published recipes; and at each of our budgets the
target-size search of llama.cpp's open request, the greedy search of GGUF-Tool-Suite, the search of collaborative compression, and REAP
before the target-size search.  peers/recipes.py and peers/searches.py say where each comes from, peers/standings.py who stands where.
16-bit files are no peers.

Ours are ten builds from the size of Q8_0 down to 8 % of the checkpoint, for each seed (another slice of the calibration text), and builds
calibrated on one or two domains and measured on these.  What was measured is kept in --work: a killed run goes on, a second one is short.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import table
from arguments import make_parser
from calibrated import Built, CalibratedModel
from measure import Reference
from peers import jobs as peer_jobs
from peers import standings
from peers.jobs import Job
from peers.standings import Entry, Ours
from threadpoolctl import threadpool_limits

BUDGETS = 10
TASKS = (("python",), ("english", "german"))  # domains that a task-specific plan is calibrated on
TASK_BUDGETS = (3, 5, 7)  # of the ten
COLUMNS = """\
A peer stands with its smallest file that is not smaller than ours, or, where it searches for a size itself, with its file for the same
budget; of each class the best counts.  Classes: "one type" stores every tensor alike; "mix" is llama-quantize's own; "random",
"frequency", "REAP" and "REAP sum" drop experts by lot or by that score before a mix; "PMQ", "CC-MoE", "APEX" and "published" are recipes
of other projects; "target size" (llama.cpp's open request), "greedy" (GGUF-Tool-Suite), "collaborative" (arXiv 2509.25689) and "REAP +
target size" search types for a size.  "Predicted" is the KL that our plan promised, "p99" is the 99th percentile of the KL of single
tokens, and "top-1" is the share of tokens whose first choice is the original's."""


class Clock:
    """Progress lines with the time that is left, from the pace of what had to be measured so far."""

    def __init__(self, what: str, todo: int) -> None:
        self.what, self.todo, self.done, self.start = what, todo, 0, time.monotonic()

    def tick(self, line: str) -> None:
        """One more was measured."""
        self.done += 1
        left = (time.monotonic() - self.start) / self.done * (self.todo - self.done)
        print(f"  {self.what} {self.done} of {self.todo}, {left / 60:.0f} min left: {line}", flush=True)


def budgets_of(calibrated: CalibratedModel, n: int) -> list[int]:
    """Bytes of our files, evenly spaced on a log scale from the size of llama-quantize's Q8_0 to the least."""
    job = next(j for j in peer_jobs.mix_jobs(calibrated) if (j.kind, j.name) == ("mix", "Q8_0"))
    largest, lowest = calibrated.held.measure(job.make, *job.made_from).size, calibrated.least_file()
    return [round(largest * (lowest / largest) ** (i / max(n - 1, 1))) for i in range(n)]


def measure_jobs(reference: Reference, what: str, jobs: Iterable[Job]) -> list[Entry]:
    """Peers' files, each measured once."""
    listed = list(jobs)
    clock, found = Clock(what, len({str(j.made_from) for j in listed if not reference.knows(*j.made_from)})), []
    for job in listed:
        known = reference.knows(*job.made_from)
        score = reference.measure(job.make, *job.made_from)
        if not known:
            clock.tick(f"{job.kind}, {job.recipe}, {job.name}: {score.size} bytes, KL {reference.mean_kl(score):.5f}")
        found.append(Entry(kind=job.kind, recipe=job.recipe, name=job.name, score=score, budget=job.budget))
    return found


def build_one(made_of: tuple[Any, ...], size: int, threads: int) -> Built:
    """One of our builds, in a process of its own."""
    import torch

    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        return CalibratedModel(*made_of).build(size)


def measure_ours(wanted: dict[tuple[int, int], tuple[CalibratedModel, int]], jobs: int) -> dict[tuple[int, int], Ours]:
    """Our builds, `jobs` at a time: by number of the calibrated and of the budget, its bytes."""
    todo = {key: place for key, place in wanted.items() if not place[0].known(place[1])}
    clock, threads = Clock("ours", len(todo)), max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(build_one, calibrated.made_of, size, threads): (calibrated, size) for calibrated, size in todo.values()}
        for future in as_completed(running):
            (calibrated, size), built = running[future], future.result()
            calibrated.remember(size, built)
            clock.tick(
                f"{calibrated.title}, {built.score.size} bytes, {built.count} experts, KL {calibrated.held.mean_kl(built.score):.5f}"
            )
    found = {}
    for key, (calibrated, size) in wanted.items():
        if known := calibrated.known(size):
            found[key] = Ours(budget=key[1], count=known.count, predicted=known.predicted, score=known.score)
    return found


def write_up(
    calibrated: CalibratedModel,
    command: str,
    runs: list[tuple[int, list[Ours], list[Entry]]],
    tasks: list[tuple[tuple[str, ...], list[Ours]]],
) -> str:
    """All tables as one page."""
    reference, (_, ours, found) = calibrated.held, runs[0]
    windows = [int((reference.windows.domain == d).sum()) for d in range(len(reference.names))]
    lines = [f"# {calibrated.model.name}: quality at equal bytes", ""]
    lines += [f"{table.made_by(command)}.", ""]
    plain = next(p.score for p in found if p.kind == "16-bit")
    tokens, perplexity = int(reference.windows.lengths.sum()), reference.perplexity(plain, range(len(reference.names)))
    lines += [
        f"KL in nats per token against the original in F32, on {tokens} held-out tokens: {min(windows)} windows of",
        f"each of {', '.join(reference.names)} (no calibration text of the last kind). ± is one standard error over windows; a difference",
        "is taken window by window, and a tie below two of its standard errors or below the noise floor, the KL of the F16 file:",
        f"{standings.noise_floor(reference, found):.1e} (its perplexity is {perplexity:.2f}). In brackets:",
        "recipe, name and MB of the file that a peer stands with.",
        "",
        COLUMNS,
        "",
    ]
    main_table = standings.main_table(reference, ours, found, calibrated.model.n_experts)
    lines += ["## At every budget, beside the best of all peers", "", *main_table, ""]
    lines += ["## Beside the best of each class", "", *standings.class_table(reference, ours, found), ""]
    lines += ["## By domain: ours / the best peer there", "", *standings.domain_table(reference, ours, found), ""]
    lines += ["## Other calibration text", "", *standings.seed_table(reference, runs), ""]
    if tasks:
        lines += ["## Calibrated on a task, measured on it", "", *standings.task_table(reference, tasks, ours, found), ""]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, work=True, tokens=10_240, calibration_tokens=65_536, results="NAME.md and NAME.svg")
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1], help="slices of the calibration text: the first for all, the others for mixes"
    )
    parser.add_argument("--budgets", type=int, default=BUDGETS, help="how many sizes")
    parser.add_argument("--only", nargs="*", help="classes of peers to look at (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="our builds that run at once; each takes its share of the cores")
    parser.add_argument("--no-tasks", action="store_true", help="no task-specific plans")
    return parser.parse_args()


def command_of(options: argparse.Namespace) -> str:
    """What was asked for, without folders."""
    words = [f"{options.model} --tokens {options.tokens} --calibration-tokens {options.calibration_tokens} --budgets {options.budgets}"]
    words += [f"--seeds {' '.join(map(str, options.seeds))}"]
    words += [f"--only {' '.join(map(repr, options.only))}"] if options.only else []
    words += ["--no-tasks"] if options.no_tasks else []
    words += [f"--jobs {options.jobs}"] if options.jobs > 1 else []
    return " ".join(["python benchmarks/quality.py", *words])


def measure_seed(options: argparse.Namespace, calibrated: CalibratedModel, budgets: list[int], *, everything: bool) -> list[Entry]:
    """The peers of one slice of calibration text: all of them, or the mixes alone; those that no one asked for are left out."""

    def wanted(jobs: Iterable[Job]) -> list[Job]:
        return [j for j in jobs if not options.only or j.kind in (*options.only, "16-bit")]

    found = measure_jobs(calibrated.held, f"mixes (seed {calibrated.seed})", wanted(peer_jobs.mix_jobs(calibrated)))
    if everything:
        found += measure_jobs(calibrated.held, "recipes", wanted(peer_jobs.recipe_jobs(calibrated)))
        if not options.only or set(options.only) & set(peer_jobs.SEARCHES):
            probe = calibrated.probe()
            measure_jobs(probe, "probes of the searches", peer_jobs.probe_jobs(calibrated))
            found += measure_jobs(calibrated.held, "searches", wanted(peer_jobs.search_jobs(calibrated, probe, budgets)))
        found += measure_jobs(calibrated.held, "drops", wanted(peer_jobs.drop_jobs(calibrated)))
    return found


def main() -> None:
    """Measure everything; write the tables and the picture."""
    options = parse()
    work = options.work / options.model.name
    work.mkdir(parents=True, exist_ok=True)
    lock = (work / "lock").open("w")  # held until the end: two runs would write the same files
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"{work}: another run is at work there") from None
    common = (options.model, work, options.tokens, options.calibration_tokens)
    slices = [CalibratedModel(*common, seed) for seed in options.seeds]
    first = slices[0]
    budgets = budgets_of(first, options.budgets)
    found = [measure_seed(options, calibrated, budgets, everything=calibrated is first) for calibrated in slices]
    names = () if options.no_tasks else TASKS
    special = [CalibratedModel(*common, first.seed, domains) for domains in names]
    few = [i for i in TASK_BUDGETS if i < len(budgets)]
    wanted = {(b, i): (calibrated, budgets[i]) for b, calibrated in enumerate(slices) for i in range(len(budgets))}
    wanted |= {(b, i): (calibrated, budgets[i]) for b, calibrated in enumerate(special, len(slices)) for i in few}
    ours = measure_ours(wanted, options.jobs)
    runs = [(calibrated.seed, [ours[b, i] for i in range(len(budgets))], found[b]) for b, calibrated in enumerate(slices)]
    tasks = [(domains, [ours[b, i] for i in few]) for b, domains in enumerate(names, len(slices))]
    text = write_up(first, command_of(options), runs, tasks)
    table.save(options.results, f"{first.model.name}.md", [text])
    dots = {k: [(p.score.size, first.held.mean_kl(p.score)) for p in runs[0][2] if p.kind == k] for k in standings.kinds()}
    line = [(o.score.size, first.held.mean_kl(o.score)) for o in runs[0][1]]
    (options.results / f"{first.model.name}.svg").write_text(table.draw(f"{first.model.name}: quality at equal bytes", line, dots))
    print(text)


if __name__ == "__main__":
    main()
