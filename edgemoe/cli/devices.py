"""`edgemoe devices` and `--device`: a box's name -> its budget, in words and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgemoe.base.errors import UsageError
from edgemoe.base.units import format_bytes, parse_bytes
from edgemoe.cli.progress import say

if TYPE_CHECKING:
    from edgemoe.devices.profiles import Device, MemoryPool

devices_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="What boxes really give a model: budgets for `build --device NAME`, with their sources.",
)
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
FileOpt = Annotated[
    str | None, typer.Option("--file", metavar="FILE", help="Profiles of your own, in the form of edgemoe/devices/devices.yaml.")
]
NAMES = "ID (see list), ID:raised when its limit was raised, FILE.yaml#ID, or here"


@devices_app.command("list")
def list_devices(file: FileOpt = None, as_json: JsonOpt = False) -> None:
    """Every known box and the budget it gives."""
    from pathlib import Path

    from edgemoe.devices.profiles import load_devices

    known = load_devices(Path(file) if file else None)
    if as_json:
        print(json.dumps([_facts(device) for device in known.values()], indent=1))
        return
    say(f"{'device':24s} {'budget':>10s} {'raised':>10s} {'GB/s':>6s}  name")
    for device in known.values():
        pool = device.pools[0]
        raised = _gib(pool.raised - pool.reserve) if pool.raised else ""
        mark = "" if device.verified else " (not verified)"
        say(f"{device.id:24s} {_gib(pool.budget):>10s} {raised:>10s} {pool.bandwidth / 1e9:6.0f}  {device.name}{mark}")


@devices_app.command("show")
def show_device(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"{NAMES}.")],
    read: Annotated[str | None, typer.Option(metavar="SIZE", help="Also the most tokens/s when a token reads this much.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """What one box gives, why, and who says so."""
    _show(open_device(name), read, as_json=as_json)


@devices_app.command("detect")
def detect(
    read: Annotated[str | None, typer.Option(metavar="SIZE", help="Also the most tokens/s when a token reads this much.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """What this machine gives now; its memory bandwidth is measured, for a quarter of a second."""
    from edgemoe.devices.detect import detect_device, measure_bandwidth

    device = detect_device()
    main = replace(device.pools[0], measured=round(measure_bandwidth()))
    _show(replace(device, pools=(main, *device.pools[1:])), read, as_json=as_json)


def open_device(name: str) -> Device:
    """A device by what the user calls it; `here` is this machine."""
    from edgemoe.devices.detect import detect_device
    from edgemoe.devices.profiles import HERE, find_device

    return detect_device() if name == HERE else find_device(name)


def choose_budget(memory: str | None, device: str | None) -> tuple[int, Device | None]:
    """Bytes from --memory or from --device, of which exactly one is given, and the device; says on stderr what it gives and keeps.

    Raises:
        UsageError: both or none are given, or the device gives nothing.
    """
    if memory and device:
        raise UsageError("--memory and --device are both given", hint="give one: a device is a name for a budget")
    if memory:
        return parse_bytes(memory), None
    if not device:
        raise UsageError("how much memory may the model use?", hint="give --memory SIZE (16GB), or --device NAME (`edgemoe devices list`)")
    from edgemoe.devices.profiles import budget_of

    found = open_device(device)
    budget, pool = budget_of(found), found.pools[0]
    parts = f"{format_bytes(pool.usable)} usable - {format_bytes(pool.reserve)} reserve"
    say(f"{found.id}: budget {format_bytes(budget)} = {parts} ({pool.why})", error=True)
    if pool.raised > pool.usable:
        say(f"{found.id}: --device {device}:raised plans for {_gib(pool.raised - pool.reserve)}; needs {pool.raise_with}", error=True)
    for other in found.pools[1:]:
        say(f"{found.id}: {_gib(other.budget)} of {other.name} are not planned for", error=True)
    if not found.verified:
        say(f"{found.id}: these figures are not verified; `edgemoe devices detect` on the box says more", error=True)
    return budget, found


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _facts(device: Device) -> dict[str, Any]:
    pools = [{**asdict(pool), "budget": pool.budget} for pool in device.pools]
    return {**asdict(device), "pools": pools, "budget": device.pools[0].budget}


def _show(device: Device, read: str | None, *, as_json: bool) -> None:
    speeds = [_speeds(pool, parse_bytes(read)) if read else {} for pool in device.pools]
    if as_json:
        facts = _facts(device)
        if read:
            facts["most_tokens_per_second"] = {pool.name: speed for pool, speed in zip(device.pools, speeds, strict=True)}
        print(json.dumps(facts, indent=1))
        return
    rows = {"device": f"{device.id}: {device.name}", "cpu": device.cpu, "backend": device.backend}
    rows["source"] = f"{device.source} ({device.date}){'' if device.verified else ', NOT VERIFIED'}"
    for pool, speed in zip(device.pools, speeds, strict=True):
        rows |= {f"{pool.name} {key}": text for key, text in _pool_rows(pool, speed).items()}
    say(*(f"{name:18s} {text}" for name, text in rows.items()))


def _pool_rows(pool: MemoryPool, speed: dict[str, float]) -> dict[str, str]:
    from edgemoe.devices.profiles import SLOWER

    rows = {"total": format_bytes(pool.total), "usable": format_bytes(pool.usable), "reserve": format_bytes(pool.reserve)}
    rows |= {"budget": format_bytes(pool.budget), "why": pool.why}
    if pool.raised:
        rows["raised"] = f"{format_bytes(pool.raised)} usable after: {pool.raise_with}"
    rates = {"peak": pool.bandwidth, "measured": pool.measured}
    rows["bandwidth"] = ", ".join(f"{rate / 1e9:.1f} GB/s {kind}" for kind, rate in rates.items() if rate) or "not known"
    if speed:
        most = ", ".join(f"{tokens:.1f} tokens/s ({kind} bandwidth)" for kind, tokens in speed.items())
        rows["ceiling"] = f"{most}; published runs were {SLOWER[0]} to {SLOWER[1]} times slower"
    return rows


def _speeds(pool: MemoryPool, read: int) -> dict[str, float]:
    """Ceilings of decode speed by kind of bandwidth, tokens per second."""
    from edgemoe.devices.profiles import estimate_speed

    rates = {"peak": pool.bandwidth, "measured": pool.measured}
    return {kind: estimate_speed(read, 0, rate) for kind, rate in rates.items() if rate}
