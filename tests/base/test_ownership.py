"""What edgemoe did not write is never replaced, and what it wrote only with --force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgemoe.base.errors import UsageError
from edgemoe.base.ownership import check_replaceable, is_ours, seal_text
from edgemoe.base.storage import save_arrays, save_sealed


def make(path: Path) -> Path:
    """A file that edgemoe wrote."""
    if path.suffix == ".json":
        save_sealed(path, {"record": "Plan", "size": 3})
    elif path.suffix == ".safetensors":
        save_arrays(path, {"kept": np.arange(4)})
    elif path.suffix == ".txt":
        path.write_text("^blk\\.0\\.attn_q\\.weight$=q4_k\n")
    else:
        path.write_text(seal_text("<p>page</p>\n"))
    return path


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors", "report.html", "README.md", "tensor-types.txt"])
def test_ours_are_replaced_with_force_alone_and_those_of_others_never(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    check_replaceable([path], force=False)  # nothing is there
    make(path)
    check_replaceable([path], force=True)
    with pytest.raises(UsageError, match="is there already") as caught:
        check_replaceable([path], force=False)
    assert "--force" in caught.value.hint and caught.value.exit_code == 2
    data = bytearray(path.read_bytes())
    data[len(data) // 3 if name != "tensor-types.txt" else 0] ^= 1
    for foreign in (bytes(data), b"", b"mine"):
        path.write_bytes(foreign)
        for force in (False, True):
            with pytest.raises(UsageError, match="edgemoe did not write it"):
                check_replaceable([path], force=force)
        assert path.read_bytes() == foreign


def test_links_and_folders_are_not_ours(tmp_path: Path) -> None:
    ours = make(tmp_path / "plan.json")
    (tmp_path / "link.json").symlink_to(ours)
    (tmp_path / "broken.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.json").mkdir()
    for name in ("link.json", "broken.json", "folder.json"):
        assert not is_ours(tmp_path / name)
        with pytest.raises(UsageError):
            check_replaceable([tmp_path / name], force=True)


def test_a_record_does_not_replace_a_record_of_another_kind(tmp_path: Path) -> None:
    path = make(tmp_path / "plan.json")
    check_replaceable([path], force=True, record="Plan")
    with pytest.raises(UsageError, match="holds no Costs"):
        check_replaceable([path], force=True, record="Costs")
