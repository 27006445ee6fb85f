"""Mutated inputs for every reader; each must be taken, or refused by an EdgemoeError of one printable line, soon and in little memory.

`python benchmarks/fuzz.py` gives them more inputs, and prints a table of what came of it.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from imatrix_file import entries_of, write
from reports import make_report
from tiny import FAMILIES, make_checkpoint

from edgemoe.base.errors import EdgemoeError
from edgemoe.base.storage import load_record, read_sealed, save_record, save_sealed
from edgemoe.base.units import parse_bytes
from edgemoe.calibrate.imatrix import read_imatrix
from edgemoe.devices import profiles
from edgemoe.devices.profiles import load_devices
from edgemoe.ir import Artifact, Costs, Model, Plan, Report
from edgemoe.model.describe import describe
from edgemoe.model.inspect import inspect_model
from edgemoe.model.licence import read_card
from edgemoe.model.tokenizer import load_tokenizer
from edgemoe.plan.solve import solve_plan
from edgemoe.price.imported import read_saliency
from edgemoe.price.priors import price_config
from edgemoe.report.model_card import render_card
from edgemoe.report.page import render_html
from edgemoe.report.terminal import summarize_plan
from edgemoe.rules.recipe import expression_rule, load_recipe
from edgemoe.stream.texts import read_text
from edgemoe.targets.gguf.vocabulary import read_vocabulary

SECONDS = 10  # that one input may take
MOST_MEMORY = 2**30  # bytes that all inputs together may add to the process
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 2**64, 10**310, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), "", " ",
    "a",    "0", "-1", "1e999", "../../etc/passwd", "/dev/zero", "\ud800", "\x1b[31mred", "two\nlines", "\u2028", "\x00", "x" * 10_000, [],
    {},     [[]],
    [None], {"": None}, [0] * 100, {"a": {"b": {"c": []}}}, "!!python/object:os.system", "__class__", "9" * 400, [[[[[[[[[[[]]]]]]]]]]],
)  # fmt: skip
TOKENS = (
    b"\xff",
    b"\x00",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\n",
    b"\r",
    b"-",
    b"9" * 40,
    b"nan",
    b"&a",
    b"*a",
    b"!!",
    b"\xe2\x80\xa8",
    b"\t",
)


class TooSlow(Exception):
    """An input took more than SECONDS."""


@dataclass
class Found:
    """What came of the inputs of one reader."""

    taken: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------- mutations
def mutate_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with one to three places changed."""
    copied = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(copied))
        if not places:
            return _hostile(rng)
        holder, key = rng.choice(places)
        action = rng.random()
        if action < 0.15:
            del holder[key]
        elif action < 0.25 and isinstance(holder, dict):
            holder[rng.choice(("\x1b[2J", "new", "", "a" * 300, f"{key}2"))] = holder.pop(key)
        elif action < 0.35 and isinstance(holder, list):
            holder.insert(key, _hostile(rng))
        elif action < 0.5 and isinstance(holder[key], int | float) and abs(holder[key]) < 1e300:
            value = holder[key]
            holder[key] = rng.choice((value * 2, -value, value + 1, value * 10**9, float(value), str(value)))
        else:
            holder[key] = _hostile(rng)
    return copied


def _hostile(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(HOSTILE))  # a list that is put into itself would have no end


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    stack = [value]
    while stack:
        holder = stack.pop()
        items = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))
        for key, inner in items[:60]:
            yield holder, key
            if isinstance(inner, dict | list):
                stack.append(inner)


def mutate_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Bytes with some flipped, cut out, put in or doubled."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        action = rng.random()
        if action < 0.3 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif action < 0.45:
            del data[at : at + rng.choice((1, 8, 100))]
        elif action < 0.55:
            del data[at:]
        elif action < 0.85:
            data[at:at] = rng.choice(TOKENS) * rng.choice((1, 1, 1, 50))
        else:
            data[at:at] = data[at : at + rng.choice((4, 200))]
    return bytes(data)


def dump(value: Any) -> bytes:
    """JSON as a hostile program writes it: NaN, infinity and lone surrogates included."""
    return json.dumps(value).encode()


# --------------------------------------------------------------------------------------------------------------- readers
Reader = Callable[[random.Random], None]


class Readers:
    """Every reader as a function that makes one input, reads it, and does with it what comes next."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = {
            family: make_checkpoint(folder / family, family, n_experts=4, hidden=64, expert_size=32, layers=1) for family in FAMILIES
        }
        self.model = inspect_model(self.models["mixtral"])
        self.bodies = {path: (path / "config.json").read_bytes() for path in self.models.values()}
        first = self.models["mixtral"]
        self.small = {name: json.loads((first / name).read_text("utf-8")) for name in ("tokenizer_config.json", "generation_config.json")}
        self.tokenizer = self._small_tokenizer(json.loads((first / "tokenizer.json").read_text("utf-8")))
        self.report = make_report()
        self.costs = price_config("Mixtral-8x7B", 512, "gguf")
        self.imatrix = write(folder / "whole.gguf", entries_of(self.model)).read_bytes()

    @staticmethod
    def _small_tokenizer(whole: dict[str, Any]) -> dict[str, Any]:
        """A tokenizer with its first tokens alone, so that thousands of copies are read in a minute."""
        vocab = {token: n for token, n in whole["model"]["vocab"].items() if n < 300}
        merges = [m for m in whole["model"]["merges"] if "".join(m if isinstance(m, list) else m.split(" ")) in vocab]
        merges = [m for m in merges if all(part in vocab for part in (m if isinstance(m, list) else m.split(" ")))]
        return {**whole, "model": {**whole["model"], "vocab": vocab, "merges": merges}}

    def _write(self, name: str, raw: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(raw)
        return path

    def config(self, rng: random.Random) -> None:
        """config.json of a checkpoint, to the layers that transformers makes of it."""
        path = self.models[rng.choice(list(self.models))]
        raw = self.bodies[path]
        values = mutate_value(rng, json.loads(raw)) if rng.random() < 0.8 else None
        try:
            (path / "config.json").write_bytes(mutate_bytes(rng, raw) if values is None else dump(values))
            model = inspect_model(path, hashed=False)
            if rng.random() < 0.3:
                from edgemoe.stream.layers import LayerStream

                LayerStream(model)
        finally:
            (path / "config.json").write_bytes(raw)

    def shape(self, rng: random.Random) -> None:
        """A config.json that is planned for without weights."""
        values = mutate_value(rng, json.loads(self.bodies[self.models[rng.choice(list(self.models))]]))
        describe(values) if isinstance(values, dict) else None

    def weights(self, rng: random.Random) -> None:
        """The header of a safetensors file."""
        path = self.models["mixtral"] / "model.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = raw[8 : 8 + length]
        values = json.loads(header)
        if rng.random() < 0.1:  # only what nobody reads
            changed = dump({**values, "__metadata__": mutate_value(rng, {"format": "pt", "more": ["of", "it"]})})
        else:
            changed = dump(mutate_value(rng, values)) if rng.random() < 0.6 else mutate_bytes(rng, header)
        size = rng.choice((*[len(changed)] * 20, length, 0, 2**40, 2**63))
        try:
            path.write_bytes(size.to_bytes(8, "little") + changed + raw[8 + length :][: rng.choice((*[10**9] * 9, 100))])
            inspect_model(path.parent, hashed=False)
        finally:
            path.write_bytes(raw)

    def tokenizer_files(self, rng: random.Random) -> None:
        """The files of a tokenizer."""
        folder = self.folder / "tokenizer"
        folder.mkdir(exist_ok=True)
        chosen = rng.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"))
        for name, values in {"tokenizer.json": self.tokenizer, **self.small, "config.json": {"eos_token_id": 0}}.items():
            raw = dump(values)
            if name == chosen:
                raw = dump(mutate_value(rng, values)) if rng.random() < 0.7 else mutate_bytes(rng, raw)
            (folder / name).write_bytes(raw)
        read_vocabulary(folder, 4096)
        load_tokenizer(folder, special=True)("Some words, \u00e4\u00f6 and <|endoftext|>.")

    def record(self, rng: random.Random) -> None:
        """A record that another program wrote, with a hash that is right or not, and what is made of it."""
        kinds: tuple[tuple[type, Any], ...] = (
            (Plan, self.report.plan),
            (Report, self.report),
            (Artifact, self.report.artifact),
            (Costs, self.costs),
            (Model, self.model),
        )
        kind, record = rng.choice(kinds)
        path = self.folder / "record.json"
        save_record(path, record)
        body, _ = read_sealed(path)
        if rng.random() < 0.75:
            changed = mutate_value(rng, body)
            try:
                save_sealed(path, changed) if isinstance(changed, dict) else path.write_bytes(dump(changed))
            except (ValueError, TypeError):  # NaN
                path.write_bytes(dump(changed))
        else:
            path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        opened: Any = load_record(path, kind)
        if isinstance(opened, Plan):
            summarize_plan(opened)
        elif isinstance(opened, Report):
            render_html(opened)
            render_card(opened)
        elif isinstance(opened, Costs) and rng.random() < 0.1:
            solve_plan(opened, 10**11, seconds=2)

    def recipe(self, rng: random.Random) -> None:
        """A recipe in YAML."""
        values = {
            "objective": "mean",
            "rules": [{"keep": {"layers": "0-3", "count": ">= 4"}}, {"expression": "bits('ffn_down_exps') >= 3"}],
        }
        raw = (
            dump(mutate_value(rng, values))
            if rng.random() < 0.5
            else mutate_bytes(rng, b"rules:\n  - expression: bits('attn_q') >= 4\n    name: a\n")
        )
        load_recipe(self._write("recipe.yaml", raw))

    def rule(self, rng: random.Random) -> None:
        """An expression on the command line."""
        text = rng.choice(("bits('attn_q') >= 4", "kept(layer=0) >= 3", "bytes('exps') / bytes() <= 0.9", "speed >= 20"))
        expression_rule(mutate_bytes(rng, text.encode()).decode("utf-8", "replace"))

    def size(self, rng: random.Random) -> None:
        """A size on the command line."""
        parse_bytes(rng.choice((mutate_bytes(rng, b"12.5GiB").decode("utf-8", "replace"), str(rng.choice(HOSTILE)))))

    def device(self, rng: random.Random) -> None:
        """Profiles of devices."""
        raw = (Path(profiles.__file__).parent / "devices.yaml").read_bytes().split(b"\n\n")[1]
        load_devices(self._write("devices.yaml", mutate_bytes(rng, raw)))

    def imatrix_file(self, rng: random.Random) -> None:
        """An importance matrix, which is a GGUF."""
        head = len(self.imatrix) // 4
        raw = mutate_bytes(rng, self.imatrix[:head]) + self.imatrix[head:]
        read_imatrix(self._write("imatrix.gguf", raw), self.model)

    def text(self, rng: random.Random) -> None:
        """A text."""
        lines = [dump({"text": "Some words."}), dump({"messages": [{"role": "user", "content": "Hello"}]})]
        name = rng.choice(("a.txt", "a.jsonl"))
        raw = b"\n".join(lines) if name.endswith("l") else b"One paragraph.\n\nAnother one.\n"
        changed = dump(mutate_value(rng, json.loads(lines[rng.randrange(2)]))) if rng.random() < 0.4 else mutate_bytes(rng, raw)
        read_text(str(self._write(name, changed)))

    def card(self, rng: random.Random) -> None:
        """README.md of a checkpoint, to the model card of what is made from it."""
        folder = self.folder / "card"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_bytes(dump(mutate_value(rng, {"_name_or_path": "a/b", "model_type": "mixtral"})))
        front = b"---\nlicense: other\nlicense_name: qwen\nlanguage:\n- en\n- de\nbase_model: a/b\ntags: [moe]\n---\n# A model\n"
        (folder / "README.md").write_bytes(mutate_bytes(rng, front))
        card = read_card(folder)
        save_sealed(self.folder / "card.json", card)
        render_card(replace(self.report, model={**self.report.model, **card}))

    def saliency(self, rng: random.Random) -> None:
        """Scores of experts as CSV."""
        rows = "layer,expert,score\n" + "".join(f"0,{e},{0.5 * e}\n" for e in range(4))
        read_saliency(self._write("scores.csv", mutate_bytes(rng, rows.encode())), self.model)

    def all(self) -> dict[str, Reader]:
        """Every reader by name."""
        names = (
            "config",
            "shape",
            "weights",
            "tokenizer_files",
            "record",
            "recipe",
            "rule",
            "size",
            "device",
            "imatrix_file",
            "text",
            "saliency",
            "card",
        )
        return {name: getattr(self, name) for name in names}


# ------------------------------------------------------------------------------------------------------------------- run
def _too_slow(_: int, frame: FrameType | None) -> None:
    raise TooSlow(f"still in {frame.f_code.co_name if frame else 'nothing'} after {SECONDS} s")


def fuzz(readers: dict[str, Reader], count: int, seed: int) -> dict[str, Found]:
    """Give the readers `count` inputs in turn, and note what is wrong: other exceptions, hangs, messages of more than one line."""
    found = {name: Found() for name in readers}
    signal.signal(signal.SIGALRM, _too_slow)
    for number in range(count):
        name = list(readers)[number % len(readers)]
        rng = random.Random(f"{seed}-{number}")
        signal.alarm(SECONDS)
        try:
            readers[name](rng)
        except EdgemoeError as error:
            found[name].refused += 1
            if not str(error).isprintable() or not error.hint.isprintable() or len(str(error)) > 1000 or error.exit_code == 1:
                found[name].wrong.append(f"input {number}: message {str(error)[:200]!r}, exit code {error.exit_code}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            found[name].wrong.append(
                f"input {number}: {type(error).__name__}: {str(error)[:150]!r} at {Path(place.filename).name}:{place.lineno}"
            )
        else:
            found[name].taken += 1
        finally:
            signal.alarm(0)
    return found


def peak_memory() -> int:
    """Most bytes that this process has had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
