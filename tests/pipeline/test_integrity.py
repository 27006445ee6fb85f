"""No wrong artifact: changed weights, damaged work files and changed results are found, whatever the moment."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from command import error_of, run_cli
from parity import emit as emit_plainly
from tiny import flat_plan, make_checkpoint

from edgemoe.base.errors import DamagedError, ModelError, UsageError, VerifyError
from edgemoe.base.storage import load_record, save_record
from edgemoe.ir import Artifact, Model, Plan, Tensor
from edgemoe.model.hashes import hash_model
from edgemoe.model.inspect import inspect_model
from edgemoe.pipeline.build import build_artifact
from edgemoe.pipeline.output_folder import find_artifact, hold_output
from edgemoe.pipeline.request import BuildRequest, Job, choose_context, prepare
from edgemoe.pipeline.store import store_weights
from edgemoe.pipeline.widths import plan_widths
from edgemoe.price.choices import least_process
from edgemoe.stream.texts import SHIPPED
from edgemoe.targets import find_target
from edgemoe.verify.artifact import _find_problems, check_files
from edgemoe.verify.logits import reference_states, tokenize_heldout

TOKENS = 2048
ROOM = 80_000  # bytes beyond the least, in which some experts must go
KINDS = {"stats", "costs", "gradients", "repair", "reference"}  # of results in a work folder
Progress = Callable[[str, int, int], None]


def quiet(stage: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


@dataclasses.dataclass(frozen=True)
class Made:
    """What all stages before the file leave: the hash of every tensor as it is stored, and of the original's states."""

    request: BuildRequest
    work: Path
    result: tuple[object, ...] = ()

    def run(self, work: Path, progress: Progress = quiet, **changes: object) -> tuple[object, ...]:
        """All stages before the file, in a work folder."""
        job = prepare(dataclasses.replace(self.request, **changes))  # type: ignore[arg-type]
        return run_stages(dataclasses.replace(job, model=hash_model(job.model)), work, progress)


def run_stages(job: Job, work: Path, progress: Progress) -> tuple[object, ...]:
    request, tokens = job.request, job.request.calibration_tokens
    work.mkdir(parents=True, exist_ok=True)
    offer, plan = plan_widths(job, work, progress)
    stored = store_weights(
        job.model,
        job.calibration,
        offer.stats,
        plan,
        work,
        narrowed=offer.narrowed,
        rounding=request.rounding,
        max_tokens=tokens,
        progress=lambda done, total: progress("repair", done, total),
    )
    states = reference_states(job.model, tokenize_heldout(job.model, job.heldout, 512), work)
    assert plan.repair and len(plan.kept[0]) < job.model.n_experts
    return (plan.kept, plan.formats, tuple(t.sha256 for t in stored.tensors), states.tobytes())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    source = make_checkpoint(folder / "random", "mixtral", n_experts=4, hidden=128, expert_size=64)
    model, target = inspect_model(source), find_target("gguf")
    request = BuildRequest(
        model=str(source),
        memory=least_process(model, target, choose_context(model, None)) + ROOM,
        out=folder / "out",
        calibration=(str(SHIPPED / "calibration" / "english.txt"),),
        heldout=(str(SHIPPED / "heldout" / "python.txt"),),
        calibration_tokens=TOKENS,
        width="full",
    )
    first = Made(request, folder / "work")
    return dataclasses.replace(first, result=first.run(folder / "work"))


def flip(path: Path, share: float = 0.5) -> None:
    with path.open("r+b") as file:
        at = int(share * (path.stat().st_size - 1))
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def all_files(work: Path) -> list[str]:
    return sorted(str(p.relative_to(work)) for p in work.rglob("*") if p.is_file() and p.stat().st_size)


# ------------------------------------------------------------------------------------------------------ damaged work files
@pytest.mark.parametrize("spoil", ["flipped", "cut"])
def test_every_damaged_file_of_the_work_folder_is_noticed_and_made_anew(
    made: Made, spoil: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All files at once, each in another place: what is read is made anew with a line that says so, and nothing wrong is made of it."""
    work = tmp_path / "work"
    shutil.copytree(made.work, work)
    names = all_files(work)
    assert {name.split("-")[0] for name in names} == KINDS
    for number, path in enumerate(work / name for name in names):
        if spoil == "flipped":
            flip(path, (number % 7) / 6)
        else:
            os.truncate(path, path.stat().st_size // 2)
    assert made.run(work) == made.result
    told = [r.getMessage() for r in caplog.records if "made anew" in r.getMessage()]
    assert {Path(line.split(": ")[0]).relative_to(work).parts[0].split("-")[0] for line in told} == KINDS
    assert all_files(work) == names


class Stop(Exception):
    """What a test throws to end a build in the middle."""


def stop_in(stage: str, least: int) -> Callable[[str, int, int], None]:
    def progress(name: str, done: int, total: int) -> None:
        if name == stage and least <= done < total:
            raise Stop

    return progress


@pytest.mark.parametrize(
    ("stage", "spoil"), [("calibrate", "states"), ("calibrate", "half progress"), ("repair", "arrays"), ("repair", "progress")]
)
def test_a_killed_build_whose_files_are_damaged_goes_on_to_the_same_bytes(made: Made, stage: str, spoil: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    if stage == "repair":
        for path in made.work.glob("[scg]*"):  # statistics, costs and gradients are there
            shutil.copytree(path, work / path.name) if path.is_dir() else shutil.copy(path, work)
    with pytest.raises(Stop):
        made.run(work, stop_in(stage, 1 if stage == "calibrate" else 5))
    (folder,) = work.glob("stats-*" if stage == "calibrate" else "repair-*")
    note = folder / "progress.json"
    if spoil == "states":
        for path in folder.glob("*.bin"):
            flip(path, 0.6)
    elif spoil == "arrays":
        flip(folder / "layer-0000.safetensors", 0.8)
    elif spoil == "progress":
        text = note.read_text(encoding="utf-8")
        note.write_text(text.replace('"done": 1', '"done": 2'), encoding="utf-8")
        assert note.read_text(encoding="utf-8") != text
    else:
        os.truncate(note, note.stat().st_size // 2)
    assert made.run(work) == made.result


# --------------------------------------------------------------------------------------------------------- changed weights
@pytest.fixture
def other(made: Made, tmp_path: Path) -> tuple[Path, Tensor]:
    """A copy of the checkpoint, and one of its experts' matrices."""
    folder = tmp_path / Path(made.request.model).name
    shutil.copytree(made.request.model, folder)
    return folder, inspect_model(folder, hashed=False).get("ffn_up_exps", 1, 2)


def zero(folder: Path, tensor: Tensor) -> None:
    with (folder / tensor.file).open("r+b") as file:
        file.seek(tensor.offset)
        file.write(bytes(tensor.n_bytes))


def test_new_weights_in_an_old_folder_give_the_result_of_the_new_model(made: Made, other: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, tensor = other
    shutil.copytree(made.work, tmp_path / "old")
    assert made.run(tmp_path / "old", model=str(folder)) == made.result  # a copy is the same model
    zero(folder, tensor)
    again = made.run(tmp_path / "old", model=str(folder))
    assert again == made.run(tmp_path / "new", model=str(folder)) != made.result


@pytest.mark.parametrize("stage", ["price", "repair"])
def test_weights_that_change_during_a_build_end_it(made: Made, other: tuple[Path, Tensor], stage: str, tmp_path: Path) -> None:
    folder, tensor = other
    changed: list[str] = []

    def progress(name: str, done: int, total: int) -> None:
        if name == stage and not changed:
            changed.append(name)
            zero(folder, tensor)

    with pytest.raises(ModelError, match="changed while it was in use") as caught:
        made.run(tmp_path / "work", progress, model=str(folder))
    assert changed and tensor.name in str(caught.value) and caught.value.exit_code == 4


# -------------------------------------------------------------------------------------------------------- changed results
def flip_after(path: Path, key: bytes, behind: int) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(key) + len(key) + behind] ^= 1
    path.write_bytes(data)


SPOILS: dict[str, Callable[[Path], object]] = {
    "a weight": lambda gguf: flip(gguf, 0.9),
    "the name": lambda gguf: flip_after(gguf, b"general.name", 14),
    "the kept experts": lambda gguf: flip_after(gguf, b"edgemoe.experts_kept", 20),
    "its end": lambda gguf: os.truncate(gguf, gguf.stat().st_size - 1),
    "a byte more": lambda gguf: gguf.write_bytes(gguf.read_bytes() + bytes(1)),
    "everything": lambda gguf: gguf.unlink(),
}


@pytest.fixture(scope="module")
def emitted(made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A folder as `emit` leaves it."""
    out, model = tmp_path_factory.mktemp("emitted") / "out", inspect_model(made.request.model)
    artifact, plan = emit_plainly(model, out), flat_plan(model)
    save_record(out / "artifact.json", artifact)
    save_record(out / "plan.json", plan)
    return model, out


@pytest.mark.parametrize("what", SPOILS)
def test_a_changed_artifact_is_found(emitted: tuple[Model, Path], what: str, tmp_path: Path) -> None:
    out = shutil.copytree(emitted[1], tmp_path / "out")
    check_files(find_artifact(out))
    (gguf,) = out.glob("*.gguf")
    SPOILS[what](gguf)
    with pytest.raises(VerifyError, match=gguf.name) as caught:
        check_files(find_artifact(out))
    assert caught.value.exit_code == 6


def test_the_command_verify_refuses_a_changed_artifact_and_writes_no_report(emitted: tuple[Model, Path], tmp_path: Path) -> None:
    out = shutil.copytree(emitted[1], tmp_path / "out")
    (gguf,) = out.glob("*.gguf")
    flip(gguf, 0.9)
    done = run_cli("verify", emitted[0].folder, out)
    assert done.returncode == 6 and "changed or damaged" in error_of(done.stderr) and gguf.name in done.stderr
    assert not (out / "report.json").exists()


def test_a_record_that_somebody_edited_is_refused(emitted: tuple[Model, Path], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    body = json.loads((emitted[1] / "plan.json").read_text(encoding="utf-8"))
    path.write_text(json.dumps({**body, "predicted_kl": body["predicted_kl"] / 2}), encoding="utf-8")
    with pytest.raises(DamagedError, match="changed or damaged"):
        load_record(path, Plan)


@pytest.mark.parametrize(("kl", "problems", "broken"), [(0.029, 0, 0), (0.031, 1, 0), (0.049, 1, 0), (0.051, 1, 1)])
def test_a_kl_far_above_the_prediction_is_a_broken_promise(emitted: tuple[Model, Path], kl: float, problems: int, broken: int) -> None:
    model, out = emitted
    artifact: Artifact = find_artifact(out)
    plan = dataclasses.replace(load_record(out / "plan.json", Plan), predicted_kl=0.01)
    found = _find_problems(artifact, model, plan, (), find_target("gguf"), 0, kl)
    assert len(found) == problems and sum(not p.startswith("note:") for p in found) == broken


# -------------------------------------------------------------------------------------------------------------- two at once
def test_a_second_run_in_one_folder_is_refused(made: Made, tmp_path: Path) -> None:
    request = dataclasses.replace(made.request, out=tmp_path / "out")
    with hold_output(tmp_path / "out"), pytest.raises(UsageError, match="another edgemoe is at work") as caught:
        build_artifact(request)
    assert caught.value.exit_code == 2
    assert not list((tmp_path / "out").iterdir())


def test_two_runs_with_one_work_folder_wait_for_each_other(made: Made, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(made.run, [tmp_path / "work"] * 2)) == [made.result] * 2
    assert all_files(tmp_path / "work") == all_files(made.work)


# -------------------------------------------------------------------------------------------------------- interrupted calls
@pytest.mark.parametrize("stage", ["calibrate", "price", "repair"])
def test_an_interrupted_call_of_the_library_leaves_no_open_files_and_no_threads(made: Made, stage: str, tmp_path: Path) -> None:
    def held() -> tuple[set[str], set[int | None]]:
        gc.collect()
        places = {os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{n}")}
        return {p for p in places if str(tmp_path) in p or str(made.work) in p}, {t.ident for t in threading.enumerate()}

    _, threads = held()
    with pytest.raises(Stop):
        made.run(tmp_path / "work", stop_in(stage, 0 if stage == "price" else 1))
    files, more = held()
    assert not files
    assert len(more - threads) <= 1  # the listener of the solver's process, which stays for the next plan
