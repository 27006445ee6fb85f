"""Boxes by name and this machine: what a process may hold there, what profiles are refused, and how far off the speed estimate is."""

import json
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from command import MODEL, environment, error_of, run_cli
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.base.errors import MachineError, ModelError, UsageError
from edgemoe.devices.detect import MARGIN, apple_pool, cgroup_limit, cpu_features, detect_device, measure_bandwidth, nvidia_pools
from edgemoe.devices.profiles import SLOWER, Device, MemoryPool, budget_of, estimate_speed, find_device, load_devices, raise_limits

GIB = 2**30
GOOD = """
box:
  name: A box
  cpu: some
  backend: CPU
  pools:
    - {name: ram, total: 16GiB, usable: 15GiB, reserve: 1GiB, why: so, bandwidth: 17GB/s}
  verified: false
  source: "me #1"
  date: "2026"
"""


# ------------------------------------------------------------------------------------------------------------- profiles
def test_no_shipped_box_gives_what_its_sticker_says() -> None:
    for device in load_devices().values():
        for pool in device.pools:
            assert 0 < pool.budget < pool.usable < pool.total and pool.raised < pool.total and pool.bandwidth > 10**10
        sticker = [int(part.removesuffix("gb")) for part in device.id.split("-") if part.endswith("gb") and part[:-2].isdigit()]
        assert all(budget_of(device) < 0.95 * size * GIB for size in sticker)  # sticks are binary
        assert budget_of(device) < 128 * 10**9 or "128gb" not in device.id


def test_every_shipped_figure_has_a_source_or_says_that_it_is_not_verified() -> None:
    for device in load_devices().values():
        assert device.date[:2] == "20"
        assert not device.verified or "#" in device.source or "README" in device.source or "talk" in device.source, device.id


@pytest.mark.parametrize(
    ("name", "usable", "raised"),
    [  # as read in the threads that the profiles name
        ("mac-128gb", int(107.52 * GIB), 114688 * 2**20),
        ("mac-96gb", 73728 * 2**20, 0),
        ("strix-halo-128gb", int(62.5 * GIB), 112 * GIB),
        ("7840hs-96gb", 46 * GIB, 20971520 * 4096),
        ("dgx-spark", 101 * GIB, 0),
    ],
)
def test_shipped_limits_are_those_that_were_reported(name: str, usable: int, raised: int) -> None:
    pool = find_device(name).pools[0]
    assert (pool.usable, pool.raised) == (usable, raised)
    if raised:
        assert find_device(f"{name}:raised").pools[0].budget == raised - pool.reserve
        assert str(raised // 2**20) in pool.raise_with or str(raised // 4096) in pool.raise_with


def test_names_are_found_in_any_case_and_a_wrong_one_names_the_nearest() -> None:
    assert find_device("RPI5-16GB").id == "rpi5-16gb"
    with pytest.raises(UsageError, match="'rpi-16gb' is not known") as caught:
        find_device("rpi-16gb")
    assert "rpi5-16gb" in caught.value.hint
    with pytest.raises(UsageError, match="not known") as caught:
        find_device("zzzzzzzz")
    assert "devices list" in caught.value.hint
    with pytest.raises(UsageError, match="no setting is known"):
        find_device("dgx-spark:raised")


def test_a_profile_of_ones_own_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    device = find_device(f"{path}#box")
    assert budget_of(device) == 14 * GIB and device.pools[0].bandwidth == 17_000_000_000
    with pytest.raises(UsageError, match="which device") as caught:
        find_device(str(path))
    assert "#ID" in caught.value.hint
    with pytest.raises(UsageError, match="cannot be read"):
        find_device(f"{tmp_path}/none.yaml#box")
    with pytest.raises(UsageError, match="cannot be read"):
        find_device(f"{tmp_path}#box")


REFUSED = {  # what is wrong: (replaced, by, what the message names)
    "unknown field": ("  cpu: some", "  cpu: some\n  colour: red", "box: the field 'colour' is not known"),
    "missing field": ("  cpu: some\n", "", "box: cpu is missing"),
    "number for text": ("name: A box", "name: 7", "box: name: must be a line of text"),
    "list for text": ("name: A box", "name: [a]", "box: name: must be a line of text"),
    "date for text": ('date: "2026"', "date: 2026-01-02", "box: date: must be a line of text"),
    "no such day": ('date: "2026"', "date: 2026-13-45", "is not plain YAML"),
    "escape codes": ("name: A box", 'name: "\\e[31mred"', "box: name: must be a line of text"),
    "text for flag": ("verified: false", "verified: maybe", "box: verified: must be true or false"),
    "size without unit": ("15GiB", "15", "pools[0]: usable: must be a line of text"),
    "quoted size without unit": ("15GiB", '"15"', "pools[0]: usable: the size '15' has no unit"),
    "size below zero": ("15GiB", "-15GiB", "pools[0]: usable: '-15GiB' is not a size"),
    "size past any box": ("15GiB", "9999TiB", "pools[0]: usable: 9999TiB is past any box"),
    "endless size": ("15GiB", "9" * 5000 + "GB", "pools[0]: usable: must be a line of text"),
    "long size": ("15GiB", "9" * 90 + "GB", "pools[0]: usable: 92 characters are no size"),
    "endless integer": ("15GiB", "9" * 5000, "is not plain YAML"),
    "more usable than total": ("15GiB", "17GiB", "pools[0]: must be reserve < usable <= raised <= total"),
    "all of it reserved": ("reserve: 1GiB", "reserve: 15GiB", "pools[0]: must be reserve < usable"),
    "raised without a setting": ("why: so", "why: so, raised: 16GiB", "pools[0]: raised and raise_with belong together"),
    "rate without seconds": ("17GB/s", "17GB", "pools[0]: bandwidth: must be a size per second"),
    "no pool": ("pools:\n    - ", "pools: []\n  x: ", "the field 'x' is not known"),
    "pools that are none": ("- {name: ram", "- ram\n    - {name: ram", "pools[0]: must be fields with values"),
    "id with a path": ("box:", "../box:", "'../box' is no device id"),
    "id that means this machine": ("box:", "here:", "'here' is no device id"),
    "id that is no text": ("box:", "5:", "'5' is no device id"),
    "key that is a list": ("  cpu: some", "  ? [a]\n  : b", "is not plain YAML"),
    "field twice": ("  cpu: some", "  cpu: some\n  cpu: other", "'cpu' is there twice"),
    "python object": ("name: A box", "name: !!python/object/apply:os.system ['touch x']", "is not plain YAML"),
    "alias": ("name: A box\n  cpu: some", "name: &a A box\n  cpu: *a", "aliases (*name) are not accepted"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_profile_is_refused_with_file_and_field(case: str, tmp_path: Path) -> None:
    old, new, message = REFUSED[case]
    path = tmp_path / "mine.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ModelError) as caught:
        load_devices(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value) and len(str(caught.value)) < 400


HOSTILE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "a list": lambda: b"- a\n- b\n",
    "not UTF-8": lambda: b"box: \xff\xfe",
    "not text": lambda: bytes(range(256)),
    "two documents": lambda: GOOD.encode() + b"---\n" + GOOD.encode(),
    "too large": lambda: GOOD.encode() + b"#" * 2**20,
    "very deep": lambda: b"[" * 100_000,
    "laughs": lambda: (
        b"a0: &a0 {k: v}\n" + b"".join(b"a%d: &a%d {<<: [%s]}\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 30))
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_profile_file_is_refused_at_once(case: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(HOSTILE[case]())
    began = time.process_time()
    with pytest.raises(ModelError, match="mine"):
        load_devices(path)
    assert time.process_time() - began < 5


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: GOOD.replace("A box", text).encode("utf-8", "surrogatepass")))
def test_any_file_is_profiles_or_a_clear_refusal(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(raw)
    try:
        assert all(isinstance(device, Device) for device in load_devices(path).values())
    except ModelError as error:
        assert "any.yaml" in str(error)


# ---------------------------------------------------------------------------------------------------------------- speed
def read_per_token(total: float, routed: float, top_k: int, experts: int, embedding: float, *, bits: float, rest: float) -> int:
    """Bytes of the weights that a token needs: 1e9 weights, bits per weight of routed experts and of the rest."""
    return int((routed * top_k / experts * bits + (total - routed - embedding) * rest) * 1e9 / 8)


def mixed(gib: float, total: float) -> float:
    return gib * GIB * 8 / total / 1e9


# Published shapes.  DeepSeek's file has gate and up in IQ2_XXS (2.0625 bits), down in Q2_K (2.625), the rest in Q8_0 (8.5), as its name
# says; of the other mixes only the size is known, so their bits are taken as even (too few for the rest: the ceiling is too high).
V4_FLASH = read_per_token(284.326, 277.025, 6, 256, 129280 * 4096 / 1e9, bits=(2 * 2.0625 + 2.625) / 3, rest=8.5)
V4_CACHE = 43 * 512 * 2 * 2048  # layers x latent x F16 x context, at most
Q3_30B = read_per_token(30.532, 28.991, 8, 128, 151936 * 2048 / 1e9, bits=2.70, rest=2.70)
Q35_35B = {
    b: read_per_token(34.661, 32.212, 8, 256, 248320 * 2048 / 1e9, bits=b, rest=b)
    for b in (16, 8.5, mixed(21.3, 34.661), mixed(12.2, 34.661))
}
RUNS = {  # bytes read, cache read, bytes/s, measured tokens/s (antirez/ds4 speed-bench; byteshape; llama-bench tables)
    "M3 Max, V4-Flash": (V4_FLASH, V4_CACHE, 400e9, 26.7),
    "M3 Ultra, V4-Flash": (V4_FLASH, V4_CACHE, 800e9, 36.9),
    "GB10, V4-Flash": (V4_FLASH, V4_CACHE, 273e9, 13.8),
    "Thor, V4-Flash": (V4_FLASH, V4_CACHE, 273e9, 13.1),
    "Pi 5, Qwen3-30B": (Q3_30B, 0, 17e9, 7.99),
    "Pi 5, Qwen3-30B, measured bandwidth": (Q3_30B, 0, 11.4e9, 7.99),
    **{f"GB10, Qwen3.5-35B at {b:.2f} bits": (n, 0, 273e9, t) for (b, n), t in zip(Q35_35B.items(), (30.4, 52.5, 62, 74.4), strict=True)},
}


@pytest.mark.parametrize("run", RUNS)
def test_the_speed_estimate_is_a_ceiling_and_published_runs_lie_within_the_stated_factor_below(run: str) -> None:
    weights, cache, bandwidth, measured = RUNS[run]
    assert SLOWER[0] <= estimate_speed(weights, cache, bandwidth) / measured <= SLOWER[1]


def test_the_stated_factors_are_no_wider_than_the_published_runs() -> None:
    factors = [estimate_speed(weights, cache, bandwidth) / measured for weights, cache, bandwidth, measured in RUNS.values()]
    assert min(factors) - SLOWER[0] < 0.1 and SLOWER[1] - max(factors) < 0.1


def test_ggml_sizes_give_the_file_sizes_that_the_speed_points_are_published_with() -> None:
    routed, rest = 277.025e9 * (2 * 2.0625 + 2.625) / 3 / 8, 7.301e9 * 8.5 / 8
    assert (routed + rest) / GIB == pytest.approx(80.76, rel=0.02)
    assert mixed(34.36, 34.661) == pytest.approx(8.5, rel=0.01)


@pytest.mark.parametrize("arguments", [(0, 0, 1e9), (1, -1, 1e9), (1, 0, 0.0), (1, 0, float("inf")), (1, 0, float("nan"))])
def test_no_speed_is_made_up_from_nothing(arguments: tuple[int, int, float]) -> None:
    with pytest.raises(UsageError, match="no speed"):
        estimate_speed(*arguments)


def test_measured_bandwidth_is_that_of_memory_and_takes_half_a_second() -> None:
    began = time.monotonic()
    assert 5e8 < measure_bandwidth(0.2) < 2e12
    assert time.monotonic() - began < 20


# --------------------------------------------------------------------------------------------------------- this machine
def fake(root: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


def test_the_limit_of_a_container_counts_with_what_it_holds_less_droppable_cache(tmp_path: Path) -> None:
    root = fake(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            f"{V2}/memory.max": f"{6 * GIB}\n",
            f"{V2}/memory.current": f"{3 * GIB}\n",
            f"{V2}/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7\n",
        },
    )
    assert cgroup_limit(root) == (6 * GIB, 4 * GIB)


def test_the_tightest_limit_above_the_process_counts(tmp_path: Path) -> None:
    texts = {"proc/self/cgroup": "0::/a/b/c\n", f"{V2}/a/b/c/memory.max": "max\n", f"{V2}/a/b/memory.max": f"{9 * GIB}\n"}
    texts |= {f"{V2}/a/b/memory.current": "0\n", f"{V2}/a/memory.max": f"{4 * GIB}\n", f"{V2}/a/memory.current": f"{GIB}\n"}
    assert cgroup_limit(fake(tmp_path, texts)) == (4 * GIB, 3 * GIB)


def test_version_1_groups_are_read_and_their_no_limit_is_none(tmp_path: Path) -> None:
    texts = {"proc/self/cgroup": "12:cpu,cpuacct:/x\n5:memory:/docker/abc\n1:name=systemd:/x\n0::/x\n"}
    texts |= {f"{V1}/memory.limit_in_bytes": "9223372036854771712\n", f"{V1}/memory.usage_in_bytes": f"{GIB}\n"}
    root = fake(tmp_path, texts)
    no_limit = cgroup_limit(root)
    assert no_limit[0] == no_limit[1] >= 2**50
    fake(tmp_path, {f"{V1}/docker/abc/memory.limit_in_bytes": f"{2 * GIB}\n", f"{V1}/docker/abc/memory.usage_in_bytes": f"{GIB}\n"})
    fake(tmp_path, {f"{V1}/docker/abc/memory.stat": f"total_inactive_file {GIB // 2}\n"})
    assert cgroup_limit(root) == (2 * GIB, 3 * GIB // 2)


@pytest.mark.parametrize("text", ["", "\n", "nonsense", "0::", "0::/../../other\n", ":::::\n", "5:memory\n"])
def test_odd_group_files_are_no_limit(text: str, tmp_path: Path) -> None:
    assert cgroup_limit(fake(tmp_path, {"proc/self/cgroup": text, "other/memory.max": "5"}))[0] >= 2**50


def test_a_machine_in_a_container_gives_what_the_container_leaves_less_the_margin(tmp_path: Path) -> None:
    limit = min(2 * GIB, psutil.virtual_memory().available // 2)
    texts = {"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": str(limit), f"{V2}/memory.current": "1048576"}
    texts["proc/cpuinfo"] = "processor : 0\nflags\t\t: fpu avx2 f16c avx512f_not\n"
    device = detect_device(fake(tmp_path, texts), nvidia_smi=str(tmp_path / "none"))
    (pool,) = device.pools
    assert (pool.total, pool.usable, pool.reserve) == (limit, limit - 2**20, MARGIN) and "container" in pool.why
    assert pool.budget == limit - 2**20 - MARGIN and device.backend == "CPU" and device.cpu.endswith("avx2, f16c")


def test_a_machine_without_a_limit_gives_what_is_free_less_the_margin(tmp_path: Path) -> None:
    free = psutil.virtual_memory().available
    device = detect_device(tmp_path, nvidia_smi=str(tmp_path / "none"))
    assert device.pools[0].budget == pytest.approx(free - MARGIN, abs=GIB) and "container" not in device.pools[0].why


def test_a_machine_with_less_than_the_margin_free_gives_no_budget() -> None:
    pool = MemoryPool(name="ram", total=2 * GIB, usable=GIB, reserve=MARGIN, why="so")
    with pytest.raises(UsageError, match="not more than the reserve") as caught:
        budget_of(replace(find_device("rpi5-16gb"), pools=(pool,)))
    assert "--memory" in caught.value.hint


def test_arm_instructions_are_read_from_their_own_line(tmp_path: Path) -> None:
    root = fake(tmp_path, {"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU part\t: 0xd0b\n"})
    assert cpu_features(root) == ["asimddp", "i8mm"]


def test_nvidia_cards_are_pools_and_boxes_that_share_memory_are_not(tmp_path: Path) -> None:
    smi = program(tmp_path / "smi", "echo '24564, 24077'; echo '[N/A], [N/A]'; echo '32607, 32000'")
    assert [(p.name, p.total, p.usable, p.reserve) for p in nvidia_pools(smi)] == [
        ("vram0", 24564 * 2**20, 24077 * 2**20, MARGIN),
        ("vram1", 32607 * 2**20, 32000 * 2**20, MARGIN),
    ]
    assert detect_device(tmp_path, nvidia_smi=smi).backend.startswith("CUDA")


def test_a_driver_that_fails_is_no_card_and_one_that_hangs_is_said(tmp_path: Path) -> None:
    assert nvidia_pools(program(tmp_path / "fails", "echo '24564, 24077'; exit 9")) == ()
    assert nvidia_pools(program(tmp_path / "noise", "printf '\\377\\376 1, 2\\n99999999999999999999, 1\\n'")) == ()
    with pytest.raises(MachineError, match="did not answer"):
        nvidia_pools(program(tmp_path / "hangs", "exec sleep 30"), timeout=0.3)


@pytest.mark.parametrize(
    ("total", "wired", "free", "usable"),
    [(32, 0, 31, 21845), (16, 0, 15, 10922), (96, 0, 95, 73728), (128, 114688, 127, 114688), (128, 0, 50, 50 * 1024)],
)
def test_a_mac_gives_its_working_set_or_what_is_free(total: int, wired: int, free: int, usable: int) -> None:
    pool = apple_pool(MemoryPool(name="ram", total=total * GIB, usable=free * GIB, reserve=MARGIN, why=""), wired)
    assert pool.usable // 2**20 == usable and pool.name == "unified"


# --------------------------------------------------------------------------------------------------------- command line
def test_list_and_show_print_the_same_budget_as_text_and_json() -> None:
    listed = json.loads(run_cli("devices", "list", "--json").stdout)
    shown = json.loads(run_cli("devices", "show", "mac-128gb", "--json").stdout)
    assert shown in listed and shown["budget"] == shown["pools"][0]["budget"] == budget_of(find_device("mac-128gb"))
    text = run_cli("devices", "list")
    assert text.returncode == 0 and text.stderr == "" and len(text.stdout.splitlines()) == len(listed) + 1
    assert "106.52 GiB" in text.stdout and "106.52 GiB" in run_cli("devices", "show", "mac-128gb").stdout


def test_show_says_the_ceiling_of_a_read_with_its_uncertainty() -> None:
    shown = run_cli("devices", "show", "rpi5-16gb", "--read", "1GB")
    assert "17.0 tokens/s (peak bandwidth), 11.4 tokens/s (measured bandwidth)" in shown.stdout and "times slower" in shown.stdout


def test_detect_measures_this_machine() -> None:
    done = run_cli("devices", "detect", "--json")
    facts = json.loads(done.stdout)
    assert done.returncode == 0 and done.stderr == ""
    assert facts["id"] == "here" and facts["pools"][0]["measured"] > 5e8 and 0 < facts["budget"] < psutil.virtual_memory().total


def test_a_device_is_a_budget_that_is_said_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD.replace("15GiB", "70MB").replace("reserve: 1GiB", "reserve: 4MB"))
    done = run_cli("build", MODEL, "--device", "mine.yaml#box", "-o", "out", "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["budget"] == 66_000_000
    assert (
        "box: budget 66.00 MB" in done.stderr and "70.00 MB" in done.stderr and "4.00 MB" in done.stderr and "not verified" in done.stderr
    )
    assert not (tmp_path / "out").exists()


def test_pools_that_are_not_planned_for_and_limits_that_can_be_raised_are_said(tmp_path: Path) -> None:
    said = run_cli("build", MODEL, "--device", "rtx4090-128gb", "-o", tmp_path / "out", "--dry-run").stderr
    assert "of vram are not planned for" in said
    said = run_cli("build", MODEL, "--device", "mac-128gb", "-o", tmp_path / "out", "--dry-run").stderr
    assert "--device mac-128gb:raised plans for 111.00 GiB; needs sudo sysctl iogpu.wired_limit_mb=114688" in said


@pytest.mark.parametrize("command", [("build", MODEL, "-o", "out"), ("plan", "costs.json")])
@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ((), "how much memory", "--device NAME"),
        (("--memory", "16GB", "--device", "rpi5-16gb"), "both given", "give one"),
        (("--device", "rpi5"), "'rpi5' is not known", "rpi5-16gb"),
    ],
)
def test_exactly_one_known_budget_is_wanted(
    command: tuple[object, ...], options: tuple[str, ...], message: str, hint: str, tmp_path: Path
) -> None:
    done = run_cli(*command, *options, cwd=tmp_path)
    assert done.returncode == 2 and message in error_of(done.stderr) and hint in done.stderr and done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_help_brings_neither_yaml_nor_psutil() -> None:
    heavy = "{'yaml', 'psutil', 'numpy', 'edgemoe.devices.profiles', 'edgemoe.devices.detect'}"
    script = f"import sys, edgemoe.cli.main; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_limits_are_raised_only_where_known() -> None:
    device = find_device("strix-halo-128gb")
    assert raise_limits(device) == find_device("strix-halo-128gb:raised") != device
