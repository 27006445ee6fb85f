"""Does any fault give a wrong artifact, leave a process behind, or cost the user a file?  Builds under every fault, and one table.

    python benchmarks/faults.py --work DIR [--only kills disks ...] [--jobs 2]

A small random checkpoint is built once without faults.  Then the same command runs under each fault, and once more without it.
"Same bytes" counts cases whose last run gave the file of the first build.  "Refused" counts runs that ended with the exit code that this
fault must have, and "ended" those that the fault did not reach.  Full and read-only disks are mounted (tmpfs), which needs root; without
it these cases are left out and the table says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from judged import PATIENCE, ROOT, SIGNALS, Bench, Case, Row, again, artifact_of, finish, judge, start

sys.path.insert(0, str(ROOT / "tests"))

KILLS, DISKS, READ_ONLY, MOMENTS = 20, 30, 10, 8


# ------------------------------------------------------------------------------------------------------------ kills, signals
def kills(bench: Bench) -> Iterator[Case]:
    """SIGKILL to the command alone, at moments over all stages."""
    for i in range(KILLS):

        def kill(row: Row, name: str, case: Path, share: float = (i + 0.5) / KILLS) -> None:
            child = start(bench.command(case), case)
            time.sleep(share * bench.seconds)
            child.kill()
            code, errors = finish(child)
            judge(bench, row, name, case, code, errors, ())
            again(bench, row, name, case)

        yield f"kill at {(i + 0.5) / KILLS:.1%}", kill


def signals(bench: Bench) -> Iterator[Case]:
    """SIGINT, SIGTERM and SIGHUP to the command alone, in each stage."""
    for number, status in SIGNALS.items():
        for stage in ("hash", "calibrate", "price", "repair", "emit"):

            def stop(row: Row, name: str, case: Path, number: int = number, status: int = status, stage: str = stage) -> None:
                child = start(bench.command(case), case)
                assert child.stderr is not None
                lines: list[str] = []
                for line in child.stderr:  # the end of a stage is told by a line, so the signal comes at the beginning of the next
                    lines.append(line)
                    if line.startswith(f"{stage} done"):
                        break
                child.send_signal(number)
                code, errors = finish(child)
                judge(bench, row, name, case, code, "".join(lines) + errors, (status,))
                again(bench, row, name, case)

            yield f"{number.name} after {stage}", stop


# ------------------------------------------------------------------------------------------------------------------- disks
@contextlib.contextmanager
def mounted(case: Path, size: str = "600m") -> Iterator[None]:
    """A disk of its own for a case."""
    case.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", case], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", case], check=True)


def fill(case: Path) -> None:
    """Take every free byte of a disk."""
    with contextlib.suppress(OSError), (case / "ballast").open("wb", buffering=0) as file:
        while file.write(bytes(2**16)):
            pass


def disks(bench: Bench) -> Iterator[Case]:
    """A disk that is full from a moment on, or that becomes read-only."""
    for i in range(DISKS + READ_ONLY):
        full = i < DISKS
        share = (i + 0.5) / DISKS if full else (i - DISKS + 0.5) / READ_ONLY

        def break_disk(row: Row, name: str, case: Path, share: float = share, full: bool = full) -> None:
            with mounted(case):
                child = start(bench.command(case), case)
                time.sleep(share * bench.seconds)
                if full:
                    fill(case)
                else:
                    until = time.monotonic() + PATIENCE  # a disk cannot become read-only while a file on it is being written
                    command = ["mount", "-o", "remount,ro", str(case)]
                    while child.poll() is None and time.monotonic() < until:
                        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                            break
                code, errors = finish(child)
                judge(bench, row, name, case, code, errors, (5,))
                subprocess.run(["mount", "-o", "remount,rw", case], check=True)
                (case / "ballast").unlink(missing_ok=True)
                again(bench, row, name, case)
            case.rmdir()

        yield f"{'full' if full else 'read-only'} at {share:.1%}", break_disk


# -------------------------------------------------------------------------------------------------------------- work files
def flips(bench: Bench) -> Iterator[Case]:
    """Every file of the work folder, with one byte flipped."""
    whole = bench.folder / "reference" / "work"
    for path in sorted(p for p in whole.rglob("*") if p.is_file() and p.stat().st_size):
        place = path.relative_to(whole)

        def flip(row: Row, name: str, case: Path, place: Path = place) -> None:
            shutil.copytree(whole, case / "work")
            flip_at(0.5)(case / "work" / place)
            again(bench, row, name, case)

        yield f"flipped {place}", flip


# ----------------------------------------------------------------------------------------------------------------- weights
def change(model: Path) -> None:
    """Flip the low bits of a row of weights in the middle of the largest file."""
    file = max(model.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    with file.open("r+b") as data:
        at = file.stat().st_size // 2
        data.seek(at)
        row = data.read(512)
        data.seek(at)
        data.write(bytes(byte ^ 0x55 for byte in row))


def weights(bench: Bench) -> Iterator[Case]:
    """Weights that change between two builds that share a work folder, and during a build."""

    def between(row: Row, name: str, case: Path) -> None:
        model = case / "elsewhere" / bench.model.name  # the name of the folder is written into the file
        shutil.copytree(bench.model, model)
        shutil.copytree(bench.folder / "reference" / "work", case / "work")
        change(model)
        old, _ = finish(start(bench.command(case, model=model), case))
        fresh = case / "fresh"
        new, _ = finish(start(bench.command(fresh, model=model), case))
        same = artifact_of(case / "out") == artifact_of(fresh / "out") != bench.sha256
        row.same += same and old == new == 0
        if not same or (old, new) != (0, 0):
            row.wrong.append(f"{name}: exits {old} and {new}, same file: {same}")
        shutil.rmtree(case)

    yield "changed between builds", between
    for i in range(MOMENTS):

        def during(row: Row, name: str, case: Path, share: float = (i + 0.5) / MOMENTS) -> None:
            model = case / "elsewhere" / bench.model.name
            shutil.copytree(bench.model, model)
            child = start(bench.command(case, model=model), case)
            time.sleep(share * bench.seconds)
            change(model)
            code, errors = finish(child)
            if code == 0 and artifact_of(case / "out") != bench.sha256:  # changed before the first byte was read
                finish(start(bench.command(case / "fresh", model=model), case))
                row.same += artifact_of(case / "out") == artifact_of(case / "fresh" / "out")
                if artifact_of(case / "out") != artifact_of(case / "fresh" / "out"):
                    row.wrong.append(f"{name}: a file of neither model, exit 0")
            else:
                judge(bench, row, name, case, code, errors, (4,))
                row.same += code == 0
            shutil.rmtree(case)

        yield f"changed at {(i + 0.5) / MOMENTS:.1%}", during


# --------------------------------------------------------------------------------------------------------------- artifacts
def flip_at(share: float) -> Callable[[Path], None]:
    """Flip a byte at a share of a file's length."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(share * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return flip


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "its first byte": ("*.gguf", flip_at(0.0)),
    "its header": ("*.gguf", flip_at(0.01)),
    "a weight": ("*.gguf", flip_at(0.5)),
    "its last byte": ("*.gguf", flip_at(1.0)),
    "cut": ("*.gguf", lambda p: os.truncate(p, p.stat().st_size - 1)),
    "longer": ("*.gguf", lambda p: p.write_bytes(p.read_bytes() + b"\0")),
    "empty": ("*.gguf", lambda p: p.write_bytes(b"")),
    "missing": ("*.gguf", lambda p: p.unlink()),
    "its record": ("report.json", flip_at(0.5)),
    "its plan": ("plan.json", flip_at(0.5)),
}


def artifacts(bench: Bench) -> Iterator[Case]:
    """A finished artifact that is damaged, and `verify`."""
    for what, (pattern, damage) in DAMAGE.items():

        def spoil(row: Row, name: str, case: Path, pattern: str = pattern, damage: Callable[[Path], object] = damage) -> None:
            shutil.copytree(bench.folder / "reference" / "out", case / "out")
            damage(next((case / "out").glob(pattern)))
            command = [sys.executable, "-m", "edgemoe", "verify", str(bench.model), str(case / "out")]
            code, errors = finish(start([*command, "--heldout", str(bench.folder / "heldout.txt")], case))
            row.refused += code == (6 if pattern == "*.gguf" else 4)
            if code not in (4, 6):
                row.wrong.append(f"{name}: exit {code} {errors[-200:]}")
            shutil.rmtree(case)

        yield f"damaged: {what}", spoil


# ------------------------------------------------------------------------------------------------------------------ shared
def shared(bench: Bench) -> Iterator[Case]:
    """Two builds at once in one OUT, and with one --work."""

    def one_out(row: Row, name: str, case: Path) -> None:
        runs = [start(bench.command(case), case) for _ in range(2)]
        ended = sorted(finish(run)[0] for run in runs)
        if ended != [0, 2] or artifact_of(case / "out") != bench.sha256:
            row.wrong.append(f"{name}: exits {ended}")
        row.refused += ended[1] == 2
        again(bench, row, name, case)

    def one_work(row: Row, name: str, case: Path) -> None:
        runs = [start(bench.command(case / side, work=case / "work"), case) for side in ("a", "b")]
        ended = [finish(run)[0] for run in runs]
        same = all(artifact_of(case / side / "out") == bench.sha256 for side in ("a", "b"))
        row.same += ended == [0, 0] and same
        if ended != [0, 0] or not same:
            row.wrong.append(f"{name}: exits {ended}, same files: {same}")
        shutil.rmtree(case)

    yield "one OUT", one_out
    yield "one --work", one_work


KINDS = {f.__name__: f for f in (kills, signals, disks, flips, weights, artifacts, shared)}


def prepare(folder: Path) -> Bench:
    """The checkpoint, and the build without faults, which also warms the compiler's cache."""
    from tiny import WHOLE_VOCAB, make_checkpoint

    model = folder / "random"
    if not (model / "config.json").exists():
        make_checkpoint(model, "mixtral", n_experts=4, hidden=128, expert_size=64, vocab=WHOLE_VOCAB)
    text = (ROOT / "edgemoe" / "stream" / "data" / "heldout" / "python.txt").read_text(encoding="utf-8")[:4000]
    (folder / "heldout.txt").write_text(text, encoding="utf-8")
    bench = Bench(folder, model, 10**9)
    dry = subprocess.run([*bench.command(folder / "dry"), "--dry-run", "--json"], capture_output=True, text=True, check=True, cwd=ROOT)
    bench = Bench(folder, model, int(json.loads(dry.stdout)["least_budget"]) + 80_000)
    for _ in range(2):
        shutil.rmtree(folder / "reference", ignore_errors=True)
        began = time.monotonic()
        code, errors = finish(start(bench.command(folder / "reference"), folder / "reference"))
        assert code == 0, errors
        seconds = time.monotonic() - began
    return Bench(folder, model, bench.budget, artifact_of(folder / "reference" / "out"), seconds)


def main() -> None:
    """Try the faults from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    bench = prepare(options.work.resolve())
    print(f"the build without faults: {bench.seconds:.1f} s, {bench.sha256[:16]}", flush=True)
    rows = {kind: Row() for kind in options.only}
    began = time.monotonic()

    def run(number: int, kind: str, case: Case) -> None:
        name, do = case
        folder = bench.folder / f"case-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        rows[kind].cases += 1
        try:
            do(rows[kind], name, folder)
        except Exception as error:  # noqa: BLE001 - a case that cannot be judged counts as wrong
            rows[kind].wrong.append(f"{name}: {type(error).__name__}: {error}")
        print(f"{time.monotonic() - began:.0f} s {kind}: {name}", file=sys.stderr, flush=True)

    numbered = [(kind, case) for kind in options.only if kind != "disks" or os.getuid() == 0 for case in KINDS[kind](bench)]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda item: run(item[0], *item[1]), enumerate(numbered)))
    print("| fault | cases | same bytes | refused | ended | wrong | orphans | lost files |\n|---|---|---|---|---|---|---|---|")
    for kind, row in rows.items():
        note = "" if row.cases else " (needs root)"
        print(f"| {kind}{note} | {row.cases} | {row.same} | {row.refused} | {row.ended} | {len(row.wrong)} | {row.orphans} | {row.lost} |")
    for row in rows.values():
        print(*row.wrong, sep="\n", end="\n" if row.wrong else "")
    sys.exit(any(row.wrong or row.orphans or row.lost for row in rows.values()))


if __name__ == "__main__":
    main()
