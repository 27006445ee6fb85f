"""This script compares builds from a GGUF, through llama.cpp alone, with builds from the checkpoint that the GGUF was made from.

    python benchmarks/gguf_sources.py examples/tiny-moe [--types F32 BF16 Q8_0] [--budgets 10] [--work DIR]

The GGUF holds every matrix in one type.  Both ways get the same bytes, calibration text and held-out text; KL is that of quality.py,
against the original in F32.  The last column is the KL of the source file itself, which a build cannot undo.  The best peer of at most a
tenth more bytes is that of quality.py's table, where this has a row of the same size.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
from pathlib import Path

import table
from arguments import make_parser
from calibrated import Built, CalibratedModel
from quality import budgets_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny import flat_plan

from edgemoe.base.errors import VerifyError
from edgemoe.base.storage import hash_file, load_record
from edgemoe.ir import Report
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.build import build_artifact
from edgemoe.pipeline.request import BuildRequest
from edgemoe.rules import ByteLimit

ROOM = 2**30  # bytes of memory beside the weights: the size of the file is what binds
COLUMNS = ("source", "file MB", "kept", "predicted", "KL", "KL from the checkpoint", "ratio", "best peer", "KL of the source")
SIZE, PEER = 0, 10  # columns of quality.py's main table


def main() -> None:
    """Build from every source at every size."""
    parser = make_parser(__doc__, work=True, calibration_tokens=65_536, results="the table")
    parser.add_argument("model", type=Path)
    parser.add_argument("--types", nargs="+", default=["F32", "BF16"])
    parser.add_argument("--budgets", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=10_240)
    arguments = parser.parse_args()
    work = arguments.work / f"quality-{arguments.model.name}"
    calibrated = CalibratedModel(arguments.model, work, arguments.tokens, arguments.calibration_tokens)
    peers = peers_of(arguments.results / f"{arguments.model.name}.md")
    rows, means = [], []
    for kind in arguments.types:
        source = write_source(calibrated, kind)
        own, ratios = calibrated.held.kl_of_file(source), []
        for size in budgets_of(calibrated, arguments.budgets):
            checkpoint = calibrated.known(size) or remember(calibrated, size)
            built = build_from(source, calibrated, size)
            kl, other = (calibrated.held.mean_kl(b.score) for b in (built, checkpoint))
            ratios.append(kl / other)
            peer = peers.get(f"{size / 1e6:.2f}", "")
            cells = (kind, f"{size / 1e6:.2f}", built.count, f"{built.predicted:.3g}", f"**{kl:.3g}**", f"{other:.3g}", f"{kl / other:.2f}")
            rows.append(table.row((*cells, peer, f"{own:.2g}")))
            print(rows[-1], flush=True)
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        means.append(f"From {kind}, the KL through llama.cpp divided by the KL from the checkpoint is {mean:.2f} (geometric mean).")
    command = f"python benchmarks/gguf_sources.py {arguments.model} --types {' '.join(arguments.types)} --budgets {arguments.budgets}"
    lines = [
        f"# {calibrated.model.name}: builds from a GGUF",
        "",
        table.made_by(command) + ".",
        "",
        *table.head(COLUMNS),
        *rows,
        "",
        *means,
        "",
    ]
    print(table.save(arguments.results, f"gguf-{calibrated.model.name}.md", lines))


def peers_of(page: Path) -> dict[str, str]:
    """KL of the best peer of at most a tenth more bytes, by the size of our file in MB, from quality.py's main table."""
    found = {}
    for line in page.read_text(encoding="utf-8").splitlines() if page.exists() else ():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > PEER and re.fullmatch(r"\d+\.\d\d", cells[SIZE]) and cells[-1] in ("win", "tie", "LOSS"):
            found.setdefault(cells[SIZE], cells[PEER] if float(cells[PEER - 1]) <= 1.1 else "")
    return found


def write_source(calibrated: CalibratedModel, kind: str) -> Path:
    """The checkpoint as a GGUF whose matrices have one type."""
    folder = calibrated.work / f"source-{kind}"
    folder.mkdir(exist_ok=True)
    found = next(iter(folder.glob("*.gguf")), None)
    return found or calibrated.target.write(calibrated.model, calibrated.stats, flat_plan(calibrated.model, kind), folder, 0, None).path


def remember(calibrated: CalibratedModel, size: int) -> Built:
    """A build from the checkpoint, kept for the next run."""
    built = calibrated.build(size)
    calibrated.remember(size, built)
    return built


def build_from(source: Path, calibrated: CalibratedModel, size: int) -> Built:
    """A build from the GGUF with so many bytes, as `CalibratedModel.build` does it from the checkpoint."""
    model = inspect_model(source, hashed=False)
    fixed = calibrated.target.fixed_sizes(model, (model.n_experts,))[0]
    request = BuildRequest(
        model=str(source),
        memory=size + ROOM,
        rules=(ByteLimit(at_most=f"{size - fixed}B"),),
        out=calibrated.work / "from-gguf",
        calibration=calibrated.files,
        calibration_tokens=calibrated.calibration_tokens,
        heldout=calibrated.check,
        work=calibrated.work,
        force=True,
    )
    shutil.rmtree(request.out, ignore_errors=True)
    try:
        build_artifact(request)
    except VerifyError as error:
        if not (request.out / "report.json").exists():
            raise
        print(f"  note: {error}")
    report = load_record(request.out / "report.json", Report)
    path = request.out / report.artifact.files[0].name
    return Built(count=report.plan.count, predicted=report.plan.predicted_kl, sha256=hash_file(path), score=calibrated.held.score(path))


if __name__ == "__main__":
    main()
