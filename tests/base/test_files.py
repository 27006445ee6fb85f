"""Files appear whole or not at all, no link of somebody else is followed, and two runs do not write into one folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgemoe.base.errors import UsageError
from edgemoe.base.files import alone, hold, new_file, remove_parts, write_text


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    write_text(path, "old")

    def fail() -> None:
        with new_file(path) as part:
            part.write_text("half", encoding="utf-8")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]
    assert path.read_text(encoding="utf-8") == "old"


def test_links_with_the_names_of_our_scratch_are_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine", encoding="utf-8")
    path = tmp_path / "record.json"
    for name in ("record.json.part", ".record.json.part", "record.json"):
        (tmp_path / name).symlink_to(mine)
    write_text(path, "ours")
    assert mine.read_text(encoding="utf-8") == "mine"
    assert path.read_text(encoding="utf-8") == "ours" and not path.is_symlink()
    (tmp_path / ".result.lock").symlink_to(mine)
    with pytest.raises(UsageError, match="symbolic link"), alone(tmp_path / "result"):
        pass
    assert mine.read_text(encoding="utf-8") == "mine"


def test_files_of_a_shared_folder_follow_the_umask(tmp_path: Path) -> None:
    code = "import os; os.umask(0o027); from pathlib import Path; from edgemoe.base.files import write_text; write_text(Path('f'), 'x')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640


def test_what_killed_runs_left_of_a_file_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "result"
    folder.mkdir()
    stay = [tmp_path / ".other-a1.part", tmp_path / "result.part", folder / "layer.part", folder / "kept.bin"]
    gone = [tmp_path / ".result-a1.part", folder / ".layer-0001-x.part"]
    for path in (*stay, *gone):
        path.write_text("", encoding="utf-8")
    remove_parts(folder)
    assert all(p.exists() for p in stay) and not any(p.exists() for p in gone)


def test_a_held_folder_refuses_a_second_run_and_is_free_again_after_the_first(tmp_path: Path) -> None:
    with hold(tmp_path), pytest.raises(UsageError, match="another edgemoe is at work"), hold(tmp_path):
        pass
    with hold(tmp_path):
        pass
