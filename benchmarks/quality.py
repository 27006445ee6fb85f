"""Our builds beside what people do today, at equal bytes: one table, one picture, all measured in llama.cpp on the same held-out text.

    python benchmarks/quality.py examples/tiny-moe [--work DIR] [--tokens 10240] [--seeds 0 1]

Peers, every file with our importance matrix: one ggml type; llama-quantize's mixes; drops by lot, frequency, REAP (published mean, and
sum) times those mixes; PMQ and CC-MoE as far as a GGUF can hold them; the tiers of APEX; published recipes; and at each of our budgets the
target-size search of llama.cpp's open request, the greedy search of GGUF-Tool-Suite, the search of collaborative compression, and REAP
before the target-size search.  recipes.py and searches.py say where each comes from, table.py who stands where.  16-bit files are no peers.

Ours are ten builds from the size of Q8_0 down to 8 % of the checkpoint, for each seed (another slice of the calibration text), and builds
calibrated on one or two domains and measured on these.  What was measured is kept in --work: a killed run goes on, a second one is short.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import peers
import table
from bench import Bench, Built
from peers import Job
from picture import draw
from table import Entry, Ours
from threadpoolctl import threadpool_limits
from yardstick import Yardstick

BUDGETS = 10
TASKS = (("python",), ("english", "german"))  # domains that a task-specific plan is calibrated on
TASK_BUDGETS = (3, 5, 7)  # of the ten


class Clock:
    """Progress lines with the time that is left, from the pace of what had to be measured so far."""

    def __init__(self, what: str, todo: int) -> None:
        self.what, self.todo, self.done, self.start = what, todo, 0, time.monotonic()

    def tick(self, line: str) -> None:
        """One more was measured."""
        self.done += 1
        left = (time.monotonic() - self.start) / self.done * (self.todo - self.done)
        print(f"  {self.what} {self.done} of {self.todo}, {left / 60:.0f} min left: {line}", flush=True)


def budgets_of(bench: Bench, n: int) -> list[int]:
    """Bytes of our files, evenly spaced on a log scale from the size of llama-quantize's Q8_0 to the least."""
    job = next(j for j in peers.mix_jobs(bench) if (j.kind, j.name) == ("mix", "Q8_0"))
    largest, lowest = bench.held.measure(job.make, *job.made_from).size, bench.least_file()
    return [round(largest * (lowest / largest) ** (i / max(n - 1, 1))) for i in range(n)]


def measure_jobs(yard: Yardstick, what: str, jobs: Iterable[Job]) -> list[Entry]:
    """Peers' files, each measured once."""
    listed = list(jobs)
    clock, found = Clock(what, len({str(j.made_from) for j in listed if not yard.knows(*j.made_from)})), []
    for job in listed:
        known = yard.knows(*job.made_from)
        score = yard.measure(job.make, *job.made_from)
        if not known:
            clock.tick(f"{job.kind}, {job.recipe}, {job.name}: {score.size} bytes, KL {peers.mean_kl(yard, score):.5f}")
        found.append(Entry(kind=job.kind, recipe=job.recipe, name=job.name, score=score, budget=job.budget))
    return found


def build_one(made_of: tuple[Any, ...], size: int, threads: int) -> Built:
    """One of our builds, in a process of its own."""
    import torch

    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        return Bench(*made_of).build(size)


def measure_ours(wanted: dict[tuple[int, int], tuple[Bench, int]], jobs: int) -> dict[tuple[int, int], Ours]:
    """Our builds, `jobs` at a time: by number of the bench and of the budget, its bytes."""
    todo = {key: place for key, place in wanted.items() if not place[0].known(place[1])}
    clock, threads = Clock("ours", len(todo)), max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(build_one, bench.made_of, size, threads): (bench, size) for bench, size in todo.values()}
        for future in as_completed(running):
            (bench, size), built = running[future], future.result()
            bench.remember(size, built)
            clock.tick(f"{bench.title}, {built.score.size} bytes, {built.count} experts, KL {peers.mean_kl(bench.held, built.score):.5f}")
    found = {}
    for key, (bench, size) in wanted.items():
        if built := bench.known(size):
            found[key] = Ours(budget=key[1], count=built.count, predicted=built.predicted, score=built.score)
    return found


def write_up(
    bench: Bench, command: str, runs: list[tuple[int, list[Ours], list[Entry]]], tasks: list[tuple[tuple[str, ...], list[Ours]]]
) -> str:
    """All tables as one page."""
    yard, (_, ours, found) = bench.held, runs[0]
    windows = [int((yard.windows.domain == d).sum()) for d in range(len(yard.names))]
    lines = [f"# {bench.model.name}: quality at equal bytes", ""]
    lines += [f"`{command}`, {datetime.now(UTC):%Y-%m-%d}, {platform.machine()}.", ""]
    lines += [
        f"KL in nats per token against the original in F32, on {int(yard.windows.lengths.sum())} held-out tokens: {min(windows)} windows of"
    ]
    lines += [
        f"each of {', '.join(yard.names)} (no calibration text of the last kind). ± is one standard error over windows; a difference is"
    ]
    lines += ["taken window by window, and a tie below two of its standard errors or below the noise floor, the KL of the F16 file:"]
    plain = next(p.score for p in found if p.kind == "16-bit")
    lines += [
        f"{table.noise_floor(yard, found):.1e} (its perplexity is {yard.perplexity(plain, range(len(yard.names))):.2f}). In brackets:"
    ]
    lines += ["recipe, name and MB of the file that a peer stands with.", ""]
    lines += ["## At every budget, beside the best of all peers", "", *table.main_table(yard, ours, found, bench.model.n_experts), ""]
    lines += ["## Beside the best of each class", "", *table.class_table(yard, ours, found), ""]
    lines += ["## By domain: ours / the best peer there", "", *table.domain_table(yard, ours, found), ""]
    lines += ["## Other calibration text", "", *table.seed_table(yard, runs), ""]
    if tasks:
        lines += ["## Calibrated on a task, measured on it", "", *table.task_table(yard, tasks, ours, found), ""]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("bench"), help="files and results are kept here between runs")
    parser.add_argument("--tokens", type=int, default=10_240, help="held-out tokens of all five texts")
    parser.add_argument("--calibration-tokens", type=int, default=65_536, help="as of build")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1], help="slices of the calibration text: the first for all, the others for mixes"
    )
    parser.add_argument("--budgets", type=int, default=BUDGETS, help="how many sizes")
    parser.add_argument("--only", nargs="*", help="classes of peers to look at (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="our builds that run at once; each takes its share of the cores")
    parser.add_argument("--no-tasks", action="store_true", help="no task-specific plans")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="where NAME.md and NAME.svg go")
    return parser.parse_args()


def command_of(options: argparse.Namespace) -> str:
    """What was asked for, without folders."""
    words = [f"{options.model} --tokens {options.tokens} --calibration-tokens {options.calibration_tokens} --budgets {options.budgets}"]
    words += [f"--seeds {' '.join(map(str, options.seeds))}"]
    words += [f"--only {' '.join(map(repr, options.only))}"] if options.only else []
    words += ["--no-tasks"] if options.no_tasks else []
    words += [f"--jobs {options.jobs}"] if options.jobs > 1 else []
    return " ".join(["python benchmarks/quality.py", *words])


def measure_seed(options: argparse.Namespace, bench: Bench, budgets: list[int], *, everything: bool) -> list[Entry]:
    """The peers of one slice of calibration text: all of them, or the mixes alone; those that no one asked for are left out."""

    def wanted(jobs: Iterable[Job]) -> list[Job]:
        return [j for j in jobs if not options.only or j.kind in (*options.only, "16-bit")]

    found = measure_jobs(bench.held, f"mixes (seed {bench.seed})", wanted(peers.mix_jobs(bench)))
    if everything:
        found += measure_jobs(bench.held, "recipes", wanted(peers.recipe_jobs(bench)))
        if not options.only or set(options.only) & set(peers.SEARCHES):
            probe = bench.probe()
            measure_jobs(probe, "probes of the searches", peers.probe_jobs(bench))
            found += measure_jobs(bench.held, "searches", wanted(peers.search_jobs(bench, probe, budgets)))
        found += measure_jobs(bench.held, "drops", wanted(peers.drop_jobs(bench)))
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
    benches = [Bench(*common, seed) for seed in options.seeds]
    first = benches[0]
    budgets = budgets_of(first, options.budgets)
    found = [measure_seed(options, bench, budgets, everything=bench is first) for bench in benches]
    names = () if options.no_tasks else TASKS
    special = [Bench(*common, first.seed, domains) for domains in names]
    few = [i for i in TASK_BUDGETS if i < len(budgets)]
    wanted = {(b, i): (bench, budgets[i]) for b, bench in enumerate(benches) for i in range(len(budgets))}
    wanted |= {(b, i): (bench, budgets[i]) for b, bench in enumerate(special, len(benches)) for i in few}
    ours = measure_ours(wanted, options.jobs)
    runs = [(bench.seed, [ours[b, i] for i in range(len(budgets))], found[b]) for b, bench in enumerate(benches)]
    tasks = [(domains, [ours[b, i] for i in few]) for b, domains in enumerate(names, len(benches))]
    text = write_up(first, command_of(options), runs, tasks)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{first.model.name}.md").write_text(text)
    dots = {k: [(p.score.size, peers.mean_kl(first.held, p.score)) for p in runs[0][2] if p.kind == k] for k in table.kinds()}
    line = [(o.score.size, peers.mean_kl(first.held, o.score)) for o in runs[0][1]]
    (options.results / f"{first.model.name}.svg").write_text(draw(f"{first.model.name}: quality at equal bytes", line, dots))
    print(text)


if __name__ == "__main__":
    main()
