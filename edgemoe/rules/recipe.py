"""This module reads a recipe (YAML) into rules and options; its expressions are checked word by word, and nothing is ever executed.

    objective: worst                       # or mean
    rules:
      - pin: {tensors: [output, embedding], at_least: Q6_K}
      - same_format: {}                    # gate and up of every layer
        name: fused
      - "kept(layers=[1,2], domain='math', top=6) >= 4"
      - expression: bytes(layers=range(40, 48)) <= 6*GiB
        name: late layers

Expressions compare sums of kept, dropped, bytes, weights, bits and active_bytes with <=, >= or ==.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgemoe.base.errors import ModelError, UsageError
from edgemoe.ir import Costs
from edgemoe.rules.constraints import Constraints
from edgemoe.rules.linear import Linear, find_domain, select_experts, select_units, sum_kept, sum_units
from edgemoe.rules.records import RECORDS, Rule

MAX_RECIPE = 2**18  # bytes
MAX_TEXT = 500  # characters of an expression
MAX_RANGE = 10_000
CONSTANTS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
QUANTITIES = ("kept", "dropped", "bytes", "weights", "bits", "active_bytes")
KEYWORDS = ("tensors", "layers", "experts", "domain", "top")
OBJECTIVES = ("mean", "worst")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The objective and the rules of a recipe."""

    rules: tuple[Rule, ...]
    objective: str


@dataclass(frozen=True, slots=True)
class Quotient:
    """Mean bits: bits over weights, to be compared with a number."""

    bits: Linear
    weights: Linear


Value = Linear | Quotient | float


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        ModelError: it cannot be read.
        UsageError: it is no recipe; the message names the place.
    """
    import yaml

    try:
        if path.stat().st_size > MAX_RECIPE:
            raise UsageError(f"{path}: is larger than {MAX_RECIPE} bytes")
        body = yaml.load(path.read_text(encoding="utf-8"), Loader=_plain_loader())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # numbers and dates that YAML knows and Python cannot make
        raise UsageError(f"{path}: is not YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(body, dict):
        raise UsageError(f"{path}: is not a recipe", hint="it has the keys rules and objective")
    unknown = sorted(map(str, set(body) - {"rules", "objective"}))
    if unknown:
        raise UsageError(f"{path}: unknown key {unknown[0]!r}", hint="known: rules, objective")
    objective = body.get("objective", "mean")
    if objective not in OBJECTIVES:
        raise UsageError(f"{path}: objective is {objective!r}", hint=f"known: {', '.join(OBJECTIVES)}")
    rules = body.get("rules") or []
    if not isinstance(rules, list):
        raise UsageError(f"{path}: rules is not a list")
    return Recipe(rules=tuple(_read_rule(item, f"{path}: rules[{i}]") for i, item in enumerate(rules)), objective=objective)


def _plain_loader() -> Any:
    """A yaml.SafeLoader that refuses aliases, because they let a few lines grow to gigabytes."""
    import yaml

    class PlainLoader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise yaml.YAMLError("aliases are not part of recipes")
            return super().compose_node(parent, index)

    return PlainLoader


def _read_rule(item: Any, place: str) -> Rule:
    if isinstance(item, str):
        return expression_rule(item)
    if not isinstance(item, dict):
        raise UsageError(f"{place}: is neither an expression nor a record")
    name = item.get("name", "")
    kinds = [k for k in item if k != "name"]
    if not isinstance(name, str) or len(kinds) != 1:
        raise UsageError(f"{place}: needs one kind of rule (and a name, if you like)", hint=f"known: expression, {', '.join(RECORDS)}")
    kind = kinds[0]
    if kind == "expression":
        return expression_rule(item[kind], name)
    if not isinstance(kind, str) or kind not in RECORDS:
        raise UsageError(f"{place}: unknown rule {kind!r}", hint=f"known: expression, {', '.join(RECORDS)}")
    return _read_record(RECORDS[kind], {} if item[kind] is None else item[kind], name, f"{place}.{kind}")


def _read_record(record: type, values: Any, name: str, place: str) -> Rule:
    from pydantic import TypeAdapter, ValidationError

    fields = [f for f in getattr(record, "__dataclass_fields__") if f != "name"]  # noqa: B009 - a type has it only if it is a dataclass
    if not isinstance(values, dict):
        raise UsageError(f"{place}: is not a mapping", hint=f"known: {', '.join(fields)}")
    unknown = [str(k) for k in values if k not in fields]
    if unknown:
        raise UsageError(f"{place}: unknown field {unknown[0]!r}", hint=f"known: {', '.join(fields)}")
    try:
        rule: Rule = TypeAdapter(record).validate_python({**{k: _as_list(k, v) for k, v in values.items()}, "name": name})
    except ValidationError as invalid:
        problem: Any = invalid.errors()[0]
        wanted = "is missing" if problem["type"] == "missing" else f"is {problem['input']!r}: {problem['msg'].lower()}"
        raise UsageError(f"{place}: {problem['loc'][0]} {wanted}", hint="see the fields in docs/rules.md") from invalid
    return rule


def _as_list(field: str, value: Any) -> Any:
    """A single layer, tensor or expert where a list of them is meant; layers as a text are a list already."""
    single = (isinstance(value, str) and field == "tensors") or (isinstance(value, int) and field in ("layers", "experts"))
    return [value] if single and not isinstance(value, bool) else value


# ------------------------------------------------------------------------------------------------------------ expressions
def expression_rule(text: Any, name: str = "") -> Rule:
    """A text rule as one that the planner can apply.

    Raises:
        UsageError: the text is not in the language (when applied, also: names what the model does not have).
    """
    if not isinstance(text, str):
        raise UsageError(f"rule {name or 'expression'!r}: is not a text")
    if len(text) > MAX_TEXT:
        raise UsageError(f"rule {text[:40]!r}...: is longer than {MAX_TEXT} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"rule {text!r}: cannot be read: {error.args[0] if error.args else error}") from error
    return TextRule(text=text.strip(), tree=tree.body, name=name or text.strip())


@dataclass(frozen=True, slots=True)
class TextRule:
    """An expression of a recipe."""

    text: str
    tree: ast.expr
    name: str

    def apply(self, constraints: Constraints) -> None:
        """Bound what it compares."""
        reader = _Reader(constraints.costs, self.text)
        try:
            compared = reader.compare(self.tree)
        except RecursionError as error:
            raise UsageError(f"rule {self.text[:40]!r}...: is nested too deeply") from error
        for number, (left, sense, right) in enumerate(compared):
            label = self.name if number == 0 else f"{self.name} ({number + 1})"
            constraints.bound(label, reader.difference(left, right, self.tree), sense, 0.0)


class _Reader:
    """Evaluates the whitelisted language over the quantities of one price list."""

    def __init__(self, costs: Costs, text: str) -> None:
        self.costs, self.text = costs, text

    def fail(self, node: ast.AST, message: str, hint: str = "") -> UsageError:
        """An error that points at the place."""
        column = getattr(node, "col_offset", 0)
        return UsageError(f"rule {self.text!r}, column {column + 1}: {message}", hint=hint)

    def compare(self, node: ast.expr) -> list[tuple[Value, str, Value]]:
        """A comparison, or a chain of them, as pairs."""
        if not isinstance(node, ast.Compare):
            raise self.fail(node, "is not a comparison", "write <=, >= or ==")
        senses = {ast.LtE: "<=", ast.GtE: ">=", ast.Eq: "=="}
        if any(type(o) not in senses for o in node.ops):
            raise self.fail(node, "only <=, >= and ==", "write <= instead of <")
        values = [self.value(part) for part in (node.left, *node.comparators)]
        return [(a, senses[type(o)], b) for a, o, b in zip(values, node.ops, values[1:], strict=False)]

    def difference(self, left: Value, right: Value, node: ast.expr) -> Linear:
        """Left - right, which must depend on the plan."""
        if isinstance(left, Quotient) or isinstance(right, Quotient):
            quotient, number = (left, right) if isinstance(left, Quotient) else (right, left)
            if not isinstance(quotient, Quotient) or not isinstance(number, int | float):
                raise self.fail(node, "bits() can only be compared with a number", "write bits(...) >= 4")
            found = quotient.bits - quotient.weights * float(number)
            return found if isinstance(left, Quotient) else -found
        if isinstance(left, Linear):
            found = left - right
        elif isinstance(right, Linear):
            found = -right + left
        else:
            raise self.fail(node, "nothing that the plan decides is in this comparison")
        if found.is_constant:
            raise self.fail(node, "nothing that the plan decides is left in this comparison")
        return found

    def value(self, node: ast.expr) -> Value:
        """Any expression."""
        if isinstance(node, ast.Constant):
            if isinstance(node.value, bool) or not isinstance(node.value, int | float) or abs(node.value) > 1e30:
                raise self.fail(node, f"{node.value!r} is not a number of this language")
            return node.value
        if isinstance(node, ast.Name):
            if node.id not in CONSTANTS:
                raise self.fail(node, f"unknown name {node.id!r}", f"known: {', '.join((*CONSTANTS, *QUANTITIES))}")
            return CONSTANTS[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return self.multiply(node, -1.0, self.value(node.operand))
        if isinstance(node, ast.BinOp):
            return self.operate(node, self.value(node.left), self.value(node.right))
        if isinstance(node, ast.Call):
            return self.quantity(node)
        raise self.fail(node, f"{type(node).__name__} is not part of the language")

    def operate(self, node: ast.BinOp, left: Value, right: Value) -> Value:
        """+, -, *, /."""
        if isinstance(node.op, ast.Mult):
            return self.multiply(node, left, right)
        if isinstance(node.op, ast.Div):
            if not isinstance(right, int | float):
                raise self.fail(node, "the divisor depends on the plan", "multiply both sides by it instead")
            if abs(right) < 1e-30:
                raise self.fail(node, "division by zero, or nearly")
            return self.multiply(node, left, 1.0 / right)
        if not isinstance(node.op, ast.Add | ast.Sub):
            raise self.fail(node, f"operator {type(node.op).__name__} is not linear")
        if isinstance(left, Quotient) or isinstance(right, Quotient):
            raise self.fail(node, "bits() can only be compared with a number")
        right = right if isinstance(node.op, ast.Add) else -right
        return right + left if isinstance(right, Linear) else left + right

    def multiply(self, node: ast.expr, left: Value, right: Value) -> Value:
        """A product of which one side is a number."""
        if isinstance(left, int | float):
            left, right = right, left
        if not isinstance(right, int | float):
            raise self.fail(node, "not linear: both factors depend on the plan")
        if isinstance(left, Quotient):
            raise self.fail(node, "bits() can only be compared with a number")
        product = left * right
        if isinstance(product, int | float) and abs(product) > 1e30:
            raise self.fail(node, "is too large a number")
        return product

    def quantity(self, node: ast.Call) -> Value:
        """kept(...), bytes(...) and their like."""
        if not isinstance(node.func, ast.Name) or node.func.id not in QUANTITIES:
            raise self.fail(node, "only these can be called", ", ".join(QUANTITIES))
        if node.args:
            raise self.fail(node, "arguments need their keyword", f"known: {', '.join(KEYWORDS)}")
        given: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg not in KEYWORDS:
                raise self.fail(node, f"unknown keyword {keyword.arg!r}", f"known: {', '.join(KEYWORDS)}")
            given[keyword.arg] = self.argument(keyword.value, whole=keyword.arg == "top")
        if "domain" in given and not isinstance(given["domain"], str):
            raise self.fail(node, "domain is the name of a calibration domain")
        if "top" in given and not (isinstance(given["top"], int) and given["top"] > 0 and "domain" in given):
            raise self.fail(node, "top is a whole number of experts of a domain", "write domain='...', top=4")
        name = node.func.id
        experts = name in ("kept", "dropped")
        wrong = set(given) & ({"tensors"} if experts else {"domain", "top"})
        if wrong or (name == "active_bytes" and "experts" in given):
            raise self.fail(node, f"{name}() has no {sorted(wrong or {'experts'})[0]}")
        return self.experts(name, given) if experts else self.units(name, given)

    def experts(self, name: str, given: Mapping[str, Any]) -> Linear:
        """Experts kept or dropped."""
        costs, mask = self.costs, select_experts(self.costs, given.get("layers"), given.get("experts"), self.text)
        if "domain" in given:
            usage = costs.usage[find_domain(costs, given["domain"], self.text)]
            rank = np.argsort(np.argsort(-usage, axis=1, kind="stable"), axis=1, kind="stable")
            mask &= rank < given.get("top", costs.n_experts)
        kept = sum_kept(costs, mask)
        return kept if name == "kept" else -kept + float(mask.sum())

    def units(self, name: str, given: Mapping[str, Any]) -> Linear | Quotient:
        """Bytes, weights, bits or active bytes of tensors."""
        tensors = given.get("tensors", "*")
        patterns = [tensors] if isinstance(tensors, str) else tensors
        found = select_units(self.costs, patterns, given.get("layers"), self.text, given.get("experts"))
        if name == "bits":
            return Quotient(sum_units(self.costs, "size", found) * 8, sum_units(self.costs, "weights", found))
        return sum_units(self.costs, {"bytes": "size", "weights": "weights", "active_bytes": "active"}[name], found)

    def argument(self, node: ast.expr, *, whole: bool) -> Any:
        """A text, a list (a bare number is a list of one, unless a `whole` number is meant), or range(a, b)."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.Constant) and isinstance(node.value, int) and not isinstance(node.value, bool):
            return node.value if whole else [node.value]
        if isinstance(node, ast.List | ast.Tuple):
            return [self.scalar(part) for part in node.elts]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range" and not node.keywords:
            bounds = [self.scalar(part) for part in node.args]
            if not 1 <= len(bounds) <= 2 or not all(isinstance(b, int) and 0 <= b <= MAX_RANGE for b in bounds):
                raise self.fail(node, "range takes one or two numbers up to 10000")
            return list(range(*bounds))
        raise self.fail(node, f"{type(node).__name__} is not part of the language")

    def scalar(self, node: ast.expr) -> Any:
        """A whole number or a text."""
        if isinstance(node, ast.Constant) and isinstance(node.value, int | str) and not isinstance(node.value, bool):
            return node.value
        raise self.fail(node, "expected a whole number or a text")
