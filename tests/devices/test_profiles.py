"""Boxes by name: what a process may hold there, what profiles are refused, and how far off the speed estimate is."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from boxes import GOOD
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.devices.profiles import SLOWER, Device, budget_of, estimate_speed, find_device, load_devices, raise_limits

GIB = 2**30


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


def test_limits_are_raised_only_where_known() -> None:
    device = find_device("strix-halo-128gb")
    assert raise_limits(device) == find_device("strix-halo-128gb:raised") != device
