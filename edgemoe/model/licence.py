"""This module reads under which licence a checkpoint is published, and finds the files that must travel with every copy of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgemoe.base.storage import read_json, regular_size

NAMES = ("license", "licence", "copying", "notice", "use_policy")  # beginnings of the names of files that a licence wants beside copies
PATTERNS = ("[Ll][Ii][Cc][Ee][NnSs][SsCc][Ee]*", "COPYING*", "NOTICE*", "USE_POLICY*")  # of these files on the hub
MAX_FILE = 2**20  # bytes of such a file or card; larger ones are no licence
FIELDS = ("license", "license_name", "license_link", "language")  # of the checkpoint's card that hold for every form of it
LONGEST, MOST_VALUES = 300, 200  # characters of a text, and texts of a list, that are passed on
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def licence_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that state its licence or must be passed on with it, by name."""
    found = [p for p in folder.iterdir() if p.name.lower().startswith(NAMES) and p.is_file()] if folder.is_dir() else []
    return sorted(p for p in found if p.suffix.lower() in ("", ".md", ".txt", ".pdf") and regular_size(p) <= MAX_FILE)


def read_card(folder: Path) -> dict[str, Any]:
    """What the checkpoint's own card says of licence and languages, for the card of what is made from it.

    `base_model` is the checkpoint itself, where its hub id is known from the hub's cache or from the name that transformers saved.
    """
    front = _front_matter(folder / "README.md")
    found = {name: front[name] for name in FIELDS if _is_plain(front.get(name))}
    cached = folder.parent.parent.name if folder.parent.name == "snapshots" else ""
    base = str(read_json(folder / "config.json").get("_name_or_path", "")) if (folder / "config.json").exists() else ""
    if cached.startswith("models--") and cached.count("--") == 2:
        found["base_model"] = "/".join(cached.split("--")[1:])
    elif _HUB_ID.fullmatch(base) and not Path(base).exists():
        found["base_model"] = base
    return found


def read_gguf_card(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a GGUF, from its own keys."""
    names = {"license": "general.license", "license_name": "general.license.name", "license_link": "general.license.link"}
    found = {name: values[key] for name, key in names.items() if _is_plain(values.get(key))}
    base = str(values.get("general.base_model.0.repo_url", "")).removeprefix("https://huggingface.co/")
    return found | ({"base_model": base} if _HUB_ID.fullmatch(base) else {})


def _is_plain(value: Any) -> bool:
    """Whether a field of a card is a short printable text, or a list of such texts."""
    values = value if isinstance(value, list) else [value]
    return 0 < len(values) <= MOST_VALUES and all(isinstance(v, str) and 0 < len(v) <= LONGEST and v.isprintable() for v in values)


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the head of a card; nothing of a card without it, or that cannot be read."""
    import yaml

    try:
        if not card.exists() or regular_size(card) > MAX_FILE:
            return {}
        match = _FRONT.match(card.read_text(encoding="utf-8"))
        loaded = yaml.safe_load(match[1]) if match else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
