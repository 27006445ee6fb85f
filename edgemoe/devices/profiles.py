"""This module gives the memory that a process may hold on a named box, and a ceiling of its decode speed.

The budget of a box is the memory that users saw one process get (`usable`), less a stated reserve; it is not the memory that the box is
sold with.  Profiles are data with their sources (devices.yaml); `detect.detect_device` looks at this machine.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.base.units import format_bytes, parse_bytes

HERE = "here"  # the id of the device that `detect.detect_device` returns
RAISED = ":raised"
MAX_FILE = 2**20  # bytes of a profile file; ours has 10 KiB
MAX_SIZE = 2**50  # bytes of a pool or of a second's traffic: 1 PiB is past any box
SLOWER = (1.3, 3.3)  # the ceiling over the speed of the published runs in tests/devices/test_profiles.py


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPool:
    """Memory that the same processor reads at the same speed; bytes, and bytes per second."""

    name: str  # unified, ram, vram
    total: int
    usable: int  # bytes that one process may take
    reserve: int  # bytes kept free inside `usable`
    why: str  # of both
    raised: int = 0  # `usable` after `raise_with`; 0 if it is not known
    raise_with: str = ""
    bandwidth: int = 0  # theoretical peak; 0 if it is not known
    measured: int = 0

    @property
    def budget(self) -> int:
        """Bytes that a plan may use."""
        return self.usable - self.reserve


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A box; the first pool is the one that a plan is made for."""

    id: str
    name: str
    cpu: str
    backend: str
    pools: tuple[MemoryPool, ...]
    verified: bool
    source: str
    date: str


def budget_of(device: Device) -> int:
    """The most that the running process may hold on a box.

    Raises:
        UsageError: the reserve takes all of it.
    """
    pool = device.pools[0]
    if pool.budget <= 0:
        raise UsageError(
            f"{device.id}: {format_bytes(pool.usable)} usable are not more than the reserve of {format_bytes(pool.reserve)}",
            hint="close other programs, or give --memory SIZE",
        )
    return pool.budget


def find_device(name: str) -> Device:
    """A shipped profile by its id; "ID:raised" is the box after its limit was raised, and "FILE.yaml#ID" is a profile of the user's.

    Raises:
        UsageError: there is no such device (the message has the nearest names), file, or limit to raise.
        ModelError: the file is malformed.
    """
    wanted, raised = name.removesuffix(RAISED), name.endswith(RAISED)
    path, _, wanted = wanted.rpartition("#")
    if not path and wanted.lower().endswith((".yaml", ".yml")):
        raise UsageError(f"--device {name}: which device of the file?", hint=f"write {wanted}#ID")
    known = load_devices(Path(path)) if path else load_devices()
    if wanted.lower() not in known:
        near = difflib.get_close_matches(wanted.lower(), known, n=3, cutoff=0.4)
        hint = (
            f"did you mean {' or '.join(near)}? `edgemoe devices list` shows all"
            if near
            else "see `edgemoe devices list`, or give --memory"
        )
        raise UsageError(f"device {wanted!r} is not known", hint=hint)
    return raise_limits(known[wanted.lower()]) if raised else known[wanted.lower()]


def raise_limits(device: Device) -> Device:
    """The box after its owner raised the memory that a process may take.

    Raises:
        UsageError: nothing is known about raising it.
    """
    if not any(pool.raised for pool in device.pools):
        raise UsageError(f"{device.id}: no setting is known that raises its limit", hint=f"ask for --device {device.id}, or give --memory")
    return replace(device, pools=tuple(replace(p, usable=p.raised or p.usable) for p in device.pools))


# ---------------------------------------------------------------------------------------------------------------- speed
def estimate_speed(active_bytes_per_token: int, kv_bytes_read: int, bandwidth: float) -> float:
    """Ceiling of decode speed, tokens per second: bandwidth / bytes read per token.

    Decoding a token takes at least the time to read its data once: the always-on weights (attention, shared experts, router, output matrix,
    and one row of the embedding), top-k of the experts, and the cache.  Real decoding also computes, launches kernels and waits.
    Published runs, peak bandwidth (tests/devices/test_profiles.py computes them again):

        ceiling / real   box, model
        1.6, 2.4         M3 Max, M3 Ultra: DeepSeek-V4-Flash 80.76 GiB (26.7, 36.9 tokens/s at a context of 2k)
        2.2, 2.3         GB10, Thor: the same file (13.8, 13.1)
        2.1              Pi 5: Qwen3-30B-A3B 9.58 GiB (7.99); 1.4 with the Pi's measured bandwidth
        1.5, 1.7         GB10: Qwen3.5-35B-A3B in F16, Q8_0 (30.4, 52.5)
        2.3, 3.3         GB10: the same as mixes of 21.3 and 12.2 GiB (62, 74.4), whose average bits alone are known

    Args:
        active_bytes_per_token: weights read for a token.
        kv_bytes_read: cache read for a token, at the context in question.
        bandwidth: bytes per second of the memory they lie in.

    Raises:
        UsageError: the bytes or the bandwidth are not positive.
    """
    read = active_bytes_per_token + kv_bytes_read
    if active_bytes_per_token <= 0 or kv_bytes_read < 0 or not 0 < bandwidth < float("inf"):
        raise UsageError(f"no speed from {read} bytes per token at {bandwidth} bytes per second")
    return bandwidth / read


# ------------------------------------------------------------------------------------------------------------- profiles
def load_devices(path: Path | None = None) -> dict[str, Device]:
    """Profiles by id, shipped or from a file of the same form.

    Raises:
        UsageError: the file cannot be read.
        ModelError: it is not such a file; names file, device and field.
    """
    source = files("edgemoe.devices") / "devices.yaml" if path is None else path
    try:
        with source.open("rb") as file:
            raw = file.read(MAX_FILE + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", hint="give a file like edgemoe/devices/devices.yaml") from error
    name = str(path or "devices.yaml")
    if len(raw) > MAX_FILE:
        raise ModelError(f"{name}: more than {format_bytes(MAX_FILE)}", hint="profiles are small")
    body = _parse_yaml(raw, name)
    if not isinstance(body, dict) or not body:
        raise ModelError(f"{name}: must map device ids to their fields")
    return {_id(name, key): _device(f"{name}: {key}", key, fields) for key, fields in body.items()}


def _parse_yaml(raw: bytes, name: str) -> Any:
    import yaml

    class Plain(yaml.SafeLoader):
        """Data only: no tags beyond YAML's own, and none of the aliases and doubled keys that grow or hide it."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not accepted")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
            if len(set(keys)) < len(keys):
                raise yaml.YAMLError(f"{max(keys, key=keys.count)!r} is there twice")
            return super().construct_mapping(node, deep=deep)

    try:
        return yaml.load(raw.decode("utf-8"), Loader=Plain)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ModelError(f"{name}: is not plain YAML: {' '.join(str(error).split())[:200]}") from error


def _id(where: str, key: Any) -> str:
    if not isinstance(key, str) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", key) or key == HERE:
        raise ModelError(f"{where}: {str(key)[:64]!r} is no device id", hint="use small letters, digits, '.', '_' and '-'")
    return key


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > 500 or not value.isprintable():
        raise ModelError(f"{where}: must be a line of text", hint='numbers and dates need quotes: "2026"')
    return value


def _size(where: str, value: Any) -> int:
    if len(_text(where, value)) > 40:
        raise ModelError(f"{where}: {len(value)} characters are no size")
    try:
        size = parse_bytes(value)
    except UsageError as error:
        raise ModelError(f"{where}: {error}", hint=error.hint) from error
    if size > MAX_SIZE:
        raise ModelError(f"{where}: {value} is past any box")
    return size


def _rate(where: str, value: Any) -> int:
    if not _text(where, value).endswith("/s"):
        raise ModelError(f"{where}: must be a size per second", hint="write it like 256GB/s")
    return _size(where, value.removesuffix("/s"))


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ModelError(f"{where}: must be true or false")
    return value


def _pools(where: str, value: Any) -> tuple[MemoryPool, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= 8:
        raise ModelError(f"{where}: must be a list of one to eight pools")
    return tuple(_pool(f"{where}[{i}]", fields) for i, fields in enumerate(value))


Readers = Mapping[str, Callable[[str, Any], Any]]
_POOL: Readers = {"name": _text, "total": _size, "usable": _size, "reserve": _size, "why": _text}
_POOL_MAY: Readers = {"raised": _size, "raise_with": _text, "bandwidth": _rate, "measured": _rate}
_DEVICE: Readers = {"name": _text, "cpu": _text, "backend": _text, "pools": _pools, "verified": _flag, "source": _text, "date": _text}


def _fields(where: str, body: Any, must: Readers, may: Readers) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise ModelError(f"{where}: must be fields with values")
    readers = {**must, **may}
    unknown, missing = [k for k in body if k not in readers], [k for k in must if k not in body]
    if unknown or missing:
        raise ModelError(f"{where}: " + (f"the field {str(unknown[0])[:40]!r} is not known" if unknown else f"{missing[0]} is missing"))
    return {key: readers[key](f"{where}: {key}", value) for key, value in body.items()}


def _device(where: str, key: str, body: Any) -> Device:
    return Device(id=key, **_fields(where, body, _DEVICE, {}))


def _pool(where: str, body: Any) -> MemoryPool:
    pool = MemoryPool(**_fields(where, body, _POOL, _POOL_MAY))
    sizes = [pool.reserve + 1, pool.usable, pool.raised or pool.total, pool.total]
    if sizes != sorted(sizes):
        raise ModelError(f"{where}: must be reserve < usable <= raised <= total")
    if bool(pool.raised) != bool(pool.raise_with):
        raise ModelError(f"{where}: raised and raise_with belong together")
    return pool
