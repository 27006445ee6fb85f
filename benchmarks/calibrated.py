"""A CalibratedModel holds statistics and prices of one model and one slice of the calibration text, and makes files from them.

Our files are what `edgemoe build` makes (pipeline.build_artifact, its defaults); peers' files go through our writer or llama-quantize, with
the same importance matrix.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from measure import Reference, Score
from peers.llama_quantize import imatrix_entries, llama_quantize
from peers.recipes import Kept

import edgemoe
from edgemoe.base.errors import VerifyError
from edgemoe.base.storage import hash_file, hash_json, load_record
from edgemoe.calibrate.collect import collect_stats
from edgemoe.ir import Costs, Plan, Report, Stats
from edgemoe.ir.memory import peak
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.build import build_artifact
from edgemoe.pipeline.request import BuildRequest, choose_context
from edgemoe.pipeline.widths import price_cached
from edgemoe.plan.infeasible import least_budget
from edgemoe.plan.solve import solve_plan
from edgemoe.quantize.importance import importance_of
from edgemoe.rules import ByteLimit
from edgemoe.stream.texts import Text, choose_texts
from edgemoe.targets import find_target

SLICES = 4  # of a calibration text, one for each seed: the shipped texts hold more than four times what is used
LEAST_SHARE = 0.08  # of the checkpoint's bytes: our smallest file, about 1.3 bits a weight
PROBE_TOKENS = 2048  # of calibration text, for the searches that measure single tensors
CHECK_CHARACTERS = 2000  # of held-out text that a build checks itself on; the benchmark measures it afterwards


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A file of ours: experts of a layer that stay, KL promised, hash of the file, and what was measured."""

    count: int
    predicted: float
    sha256: str
    score: Score


class CalibratedModel:
    """A model and one slice of the calibration texts.

    Args:
        source: the checkpoint.
        work: folder for results, statistics and files of the moment.
        tokens: held-out tokens of all texts.
        calibration_tokens: of all calibration texts.
        seed: which slice of the calibration texts comes first.
        domains: names of the calibration texts to use (none: all).
    """

    def __init__(
        self, source: Path, work: Path, tokens: int, calibration_tokens: int = 65_536, seed: int = 0, domains: tuple[str, ...] = ()
    ) -> None:
        self.title = " + ".join(domains) or f"seed {seed}"
        self.made_of = (source, work, tokens, calibration_tokens, seed, domains)
        self.model, self.target, self.work, self.seed = inspect_model(source), find_target("gguf"), work, seed
        self.source, self.calibration_tokens, self.code = source, calibration_tokens, hash_code()
        work.mkdir(parents=True, exist_ok=True)
        shipped, heldout = choose_texts([], [])
        texts = tuple(slice_text(t, seed) for t in shipped if not domains or t.name in domains)
        self.files = write_texts(work / f"texts-{seed}", texts)
        self.check = write_texts(work / "texts-check", (first_words(heldout[0]),))
        self.calibration, _ = choose_texts(self.files, self.check)
        self.names = [t.name for t in heldout]
        self.held = Reference(self.model, heldout, tokens, work)
        if min(np.bincount(self.held.windows.domain)) < 2:
            raise SystemExit(f"--tokens {tokens}: each of {len(heldout)} texts needs two windows, or there is no standard error")
        self.context = choose_context(self.model, None)
        self.stats: Stats = collect_stats(self.model, self.calibration, work, max_tokens=calibration_tokens)
        self.costs: Costs = price_cached(self.model, self.stats, self.target, self.context, work, None)[0]
        self.any_plan = solve_plan(self.costs, 10**15)
        self.overhead = peak({**self.costs.memory, "weights": 0, "staging": 0})
        importance = [importance_of(self.model, self.stats, layer) for layer in range(-1, self.model.n_layers)]
        self.imatrix = hash_json([sorted((*k, float(v.sum())) for k, v in found.items()) for found in importance])

    def probe(self) -> Reference:
        """A reference on calibration text, for searches that measure: held-out text is for the verdict alone."""
        return Reference(self.model, self.calibration, PROBE_TOKENS, self.work / f"probe-{self.seed}")

    def least_file(self) -> int:
        """Bytes of our smallest file."""
        return round(max(LEAST_SHARE * self.model.n_bytes, ((least_budget(self.costs) or 0) - self.overhead) * 1.02))

    def plan_of(self, types: Mapping[str, str], kept: Kept) -> Plan:
        """A peer's choice as a plan that the writer takes; what it predicts is nobody's."""
        return replace(self.any_plan, kept=kept, formats=dict(types), sizes=dict.fromkeys(types, 0), file_size=0, repair=False)

    def write(self, types: Mapping[str, str], kept: Kept) -> Path:
        """A peer's file, survivors as they are."""
        folder = self.work / "file"
        folder.mkdir(exist_ok=True)
        return self.target.write(self.model, self.stats, self.plan_of(types, kept), folder, 0, None).path

    def quantize(self, mix: str, kept: Kept) -> Path:
        """A peer's file by llama-quantize, from F16."""
        source = self.work / f"F16-{hash_json(kept)[:12]}.gguf"
        if not source.exists():
            for old in self.work.glob("F16-*.gguf"):
                old.unlink()
            self.write(dict.fromkeys(self.any_plan.formats, "F16"), kept).rename(source)
        return llama_quantize(source, self.work / "peer.gguf", mix, imatrix_entries(self.model, self.stats, kept))

    def known(self, size: int) -> Built | None:
        """Our file of this size as measured before, if the same code made it."""
        log = self.work / "ours.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        for key, count, predicted, sha256 in map(json.loads, lines):
            if key == self._key(size) and self.held.knows(sha256):
                return Built(count=count, predicted=predicted, sha256=sha256, score=self.held.score_of(sha256))
        return None

    def remember(self, size: int, built: Built) -> None:
        """Keep what was measured."""
        self.held.remember(built.score, built.sha256)
        with (self.work / "ours.jsonl").open("a") as log:
            log.write(json.dumps([self._key(size), built.count, built.predicted, built.sha256]) + "\n")

    def _key(self, size: int) -> str:
        return hash_json(self.model.fingerprint, self.stats.key, self.calibration_tokens, size, self.overhead, self.code)

    def build(self, size: int) -> Built:
        """Our file for `size` bytes of weights, as `edgemoe build` makes it, measured; a broken promise is told."""
        request = BuildRequest(
            model=str(self.source),
            memory=size + self.overhead,
            rules=(ByteLimit(at_most=f"{size - int(self.costs.fixed_size.max())}B"),),  # narrower experts leave room for a larger file
            out=self.work / f"ours-{self._key(size)[:16]}",
            calibration=self.files,
            calibration_tokens=self.calibration_tokens,
            heldout=self.check,
            work=self.work,
            force=True,
        )
        try:
            build_artifact(request)
        except VerifyError as error:
            if not (request.out / "report.json").exists():
                raise
            print(f"  note: {error}")
        report = load_record(request.out / "report.json", Report)
        path = request.out / report.artifact.files[0].name
        score = self.held.score(path)
        built = Built(count=report.plan.count, predicted=report.plan.predicted_kl, sha256=hash_file(path), score=score)
        shutil.rmtree(request.out)
        return built


def hash_code() -> str:
    """SHA-256 of the product's own source."""
    root = Path(edgemoe.__file__).parent
    sources = sorted({path.resolve() for folder in (root, root / "solvers", root / "targets") for path in folder.rglob("*.py")})
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


# ------------------------------------------------------------------------------------------------------------------- texts
def slice_text(text: Text, seed: int) -> Text:
    """The same text from another place on: seed s starts s quarters further and goes round."""
    start = seed % SLICES * len(text.documents) // SLICES
    return replace(text, documents=text.documents[start:] + text.documents[:start])


def first_words(text: Text) -> Text:
    """The beginning of a text."""
    return replace(text, documents=("".join(text.documents)[:CHECK_CHARACTERS],))


def write_texts(folder: Path, texts: tuple[Text, ...]) -> tuple[str, ...]:
    """Texts as files for --calibration and --heldout, documents parted by form feeds."""
    folder.mkdir(exist_ok=True)
    for text in texts:
        path, words = folder / f"{text.name}.txt", "\f".join(text.documents)
        if not path.exists() or path.read_text(encoding="utf-8") != words:  # builds that run at once read them
            path.write_text(words, encoding="utf-8")
    return tuple(str(folder / f"{text.name}.txt") for text in texts)
