"""This module turns a user's Python function into rules: the function gets a `Problem`, and returns or yields PuLP constraints.

    def keep_mathematics(p):
        for layer in p.layers[:8]:
            yield p.kept(layers=[layer], experts=p.experts(layer, domain="math", top=4)) >= 3, f"math_{layer}"

    def late_layers(p):
        return p.bytes(layers=range(40, 48)) <= 6 * p.GiB

    def traffic(p):                                  # soft: own variable with a price in nats
        over = p.new_var("over", low=0)
        p.penalty(0.02 / p.GiB * over)
        yield p.active_bytes() - over <= 3 * p.GiB

Variables stand for whole quantities (bytes of a tensor, an expert that stays), so the same function works for every kept count and solver.
PuLP accepts some mistakes silently: `0 <= x <= 1` keeps only `x <= 1`, `a and b` keeps only b, and `x != 3` is True.  We refuse these
mistakes, either by the function's result or, while it runs, when Python asks whether a comparison is true.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import GeneratorType
from typing import Any

import numpy as np

from edgemoe.base.errors import EdgemoeError, UsageError
from edgemoe.ir import Costs
from edgemoe.rules.constraints import Constraints, SoftVariable
from edgemoe.rules.linear import ARRAYS, Layers, Linear, find_domain, parse_layers, select_experts, select_units, zero

REFUSED = ("__bool__", "__ne__")  # methods that Python calls if a comparison is used as a truth value


class Ratio:
    """Mean bits per weight: a quotient, which can be compared with a number (and nothing else, or the rule would not be linear)."""

    def __init__(self, bits: Any, weights: Any) -> None:
        self.bits, self.weights = bits, weights

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, number: object) -> Any:
        raise TypeError("mean bits can hardly be equal to a number; use >= or <=")

    def __bool__(self) -> bool:
        raise TypeError("mean bits are not true or false; compare them with >= or <=")

    def __ge__(self, number: float) -> Any:
        return self.bits - number * self.weights >= 0

    def __le__(self, number: float) -> Any:
        return self.bits - number * self.weights <= 0


class Problem:
    """The program as a rule sees it: quantities as PuLP expressions, units as constants."""

    kB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12
    KiB, MiB, GiB, TiB = 2**10, 2**20, 2**30, 2**40

    def __init__(self, costs: Costs, name: str) -> None:
        import pulp

        self._costs, self._name = costs, name
        self._scratch = pulp.LpProblem("view", pulp.LpMinimize)
        self._atoms: dict[tuple[str, int, int], Any] = {}
        self._meaning: dict[int, tuple[str, int, int]] = {}  # id of a PuLP variable -> quantity
        self._soft: dict[int, SoftVariable] = {}
        self._penalties: list[Any] = []

    # ------------------------------------------------------------------------------------------------------- quantities
    @property
    def layers(self) -> list[int]:
        """Layers that have experts."""
        return self._costs.expert_layers

    @property
    def domains(self) -> tuple[str, ...]:
        """Calibration domains."""
        return self._costs.domains

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats on offer."""
        return self._costs.formats

    @property
    def n_experts(self) -> int:
        """Experts of a layer."""
        return self._costs.n_experts

    def experts(self, layer: int, domain: str | None = None, top: int | None = None) -> list[int]:
        """Experts of a layer; with a domain, those it uses most first, `top` of them."""
        everyone = list(range(self._costs.n_experts))
        if domain is None:
            return everyone
        row = self.layers.index(parse_layers([layer], self.layers, self._name)[0])
        usage = self._costs.usage[find_domain(self._costs, domain, self._name), row]
        return [int(e) for e in np.argsort(-usage, kind="stable")[:top]]

    def keep(self, layer: int, expert: int) -> Any:
        """1 if this expert stays."""
        return self.kept(layers=[layer], experts=[expert])

    def kept(self, layers: Layers = None, experts: Sequence[int] | None = None) -> Any:
        """How many of these experts stay."""
        import pulp

        mask = select_experts(self._costs, layers, experts, self._name)
        return pulp.lpSum(self._atom("keep", int(row), int(e)) for row, e in np.argwhere(mask))

    def uses(self, tensor: str, format: str) -> Any:
        """1 if this tensor is stored in this format."""
        if format.upper() not in self._costs.formats:
            raise UsageError(f"rule {self._name!r}: format {format!r} is not known", hint=f"known: {', '.join(self._costs.formats)}")
        unit = select_units(self._costs, [tensor], None, self._name)
        if len(unit) > 1:
            raise UsageError(f"rule {self._name!r}: {tensor} names {len(unit)} tensors, uses() wants one")
        return self._atom("use", unit[0], self._costs.formats.index(format.upper())) + 0

    def bytes(self, tensors: Sequence[str] = ("*",), layers: Layers = None, experts: Sequence[int] | None = None) -> Any:
        """Bytes of these tensors in the file."""
        return self._sum("size", tensors, layers, experts)

    def weights(self, tensors: Sequence[str] = ("*",), layers: Layers = None, experts: Sequence[int] | None = None) -> Any:
        """Weights of these tensors that are left."""
        return self._sum("weights", tensors, layers, experts)

    def active_bytes(self, tensors: Sequence[str] = ("*",), layers: Layers = None) -> Any:
        """Bytes of these tensors that a token reads."""
        return self._sum("active", tensors, layers, None)

    def bits(self, tensors: Sequence[str] = ("*",), layers: Layers = None, experts: Sequence[int] | None = None) -> Ratio:
        """Mean bits per weight of these tensors; compare it with a number."""
        return Ratio(8 * self.bytes(tensors, layers, experts), self.weights(tensors, layers, experts))

    def new_var(self, name: str, low: float = 0.0, high: float | None = None) -> Any:
        """A continuous variable of a soft rule."""
        top, label = math.inf if high is None else high, f"{self._name}.{name}"
        if not (math.isfinite(low) and low <= top):
            raise UsageError(
                f"rule {self._name!r}: new_var {name!r} is between {low} and {top}", hint="low is a number, and no more than high"
            )
        if any(v.name == label for v in self._soft.values()):
            raise UsageError(f"rule {self._name!r}: there are two new_var {name!r}", hint="give each a name of its own")
        variable = self._scratch.add_variable(f"new_{len(self._soft)}", low, None if math.isinf(top) else top)
        self._soft[id(variable)] = SoftVariable(name=label, low=float(low), high=float(top), price=0.0)
        self._meaning[id(variable)] = ("soft", len(self._soft) - 1, 0)
        return variable

    def penalty(self, expression: Any) -> None:
        """Nats to add to the objective: a sum of new variables times prices."""
        import pulp

        self._penalties.append(pulp.LpAffineExpression(expression))

    def _sum(self, quantity: str, tensors: Sequence[str], layers: Layers, experts: Sequence[int] | None) -> Any:
        import pulp

        patterns = [tensors] if isinstance(tensors, str) else tensors
        return pulp.lpSum(self._atom(quantity, u, 0) for u in select_units(self._costs, patterns, layers, self._name, experts))

    def _atom(self, *meaning: Any) -> Any:
        if meaning not in self._atoms:
            variable = self._scratch.add_variable(f"a{len(self._atoms):06d}", 0)
            self._atoms[meaning] = variable
            self._meaning[id(variable)] = meaning
        return self._atoms[meaning]

    # ------------------------------------------------------------------------------------------------------ translation
    def soft_variables(self) -> list[SoftVariable]:
        """The new variables with their prices."""
        prices: dict[int, float] = {}
        for expression in self._penalties:
            if expression.constant or not len(expression):
                raise UsageError(f"rule {self._name!r}: a penalty is a sum of prices times variables of new_var(), and nothing else")
            for variable, price in expression.items():
                if id(variable) not in self._soft:
                    raise UsageError(f"rule {self._name!r}: a penalty can only price variables of new_var()")
                prices[id(variable)] = prices.get(id(variable), 0.0) + float(price)
        found = [replace(v, price=prices.get(i, 0.0)) for i, v in self._soft.items()]
        for variable in found:
            if not math.isfinite(variable.price) or variable.price < 0:
                raise UsageError(f"rule {self._name!r}: the price of {variable.name} is {variable.price}, expected a number of nats >= 0")
        return found

    def translate(self, constraint: Any) -> Linear:
        """The left side of `constraint <= 0` (or >= 0, == 0) over edgemoe's own quantities."""
        n = zero(self._costs)
        arrays = {name: getattr(n, name) for name in ARRAYS}
        soft: dict[str, float] = {}
        names = list(self._soft.values())
        for variable, coefficient in constraint.items():
            if id(variable) not in self._meaning:
                raise UsageError(
                    f"rule {self._name!r}: {variable} is not a variable of this problem", hint="use p.kept(), p.bytes(), p.new_var()"
                )
            if not math.isfinite(coefficient):
                raise UsageError(f"rule {self._name!r}: a coefficient is {coefficient}")
            kind, i, j = self._meaning[id(variable)]
            if kind == "soft":
                soft[names[i].name] = float(coefficient)
            elif kind in ("keep", "use"):
                arrays[kind][i, j] += coefficient
            else:
                arrays[kind][i] += coefficient
        if not math.isfinite(constraint.constant):
            raise UsageError(f"rule {self._name!r}: its right side is {-constraint.constant}")
        return Linear(**arrays, soft=soft, constant=float(constraint.constant))


def apply_function(constraints: Constraints, function: Callable[..., Any]) -> None:
    """Run a user's function on the problem and take what it returns or yields.

    Raises:
        UsageError: the result is no rule; the message names the function and the rule.
    """
    name = function_name(function)
    once, again = (_call(constraints.costs, function, name) for _ in range(2))
    if [(label, sense) for label, _, sense in once[1]] != [(label, sense) for label, _, sense in again[1]] or not all(
        _same(a, b) for (_, a, _), (_, b, _) in zip(once[1], again[1], strict=True)
    ):
        raise UsageError(f"rule {name!r}: gives other rules when called again", hint="a rule must not be random")
    for variable in once[0].soft_variables():
        if variable.name in constraints.soft:
            raise UsageError(f"rule {name!r}: another function has this name and a variable {variable.name!r}", hint="rename one of them")
        constraints.soft[variable.name] = variable
    for label, expression, sense in once[1]:
        constraints.bound(label, expression, sense, 0.0)


def _call(costs: Costs, function: Callable[..., Any], name: str) -> tuple[Problem, list[tuple[str, Linear, str]]]:
    problem = Problem(costs, name)
    try:
        with _strict_comparisons(name):
            result = function(problem)
            items = list(result) if isinstance(result, GeneratorType | list) else [result]
    except EdgemoeError:
        raise
    except Exception as error:
        raise UsageError(f"rule {name!r}: {type(error).__name__}: {error}", hint="the function failed; rules are linear") from error
    if not items or (len(items) == 1 and items[0] is None):
        raise UsageError(f"rule {name!r}: returned nothing", hint="return or yield comparisons such as p.bytes() <= 6 * p.GiB")
    found = []
    for number, item in enumerate(items):
        constraint, label = item if isinstance(item, tuple) and len(item) == 2 else (item, f"{name}[{number}]" if len(items) > 1 else name)
        expression, sense = _check(problem, constraint, str(label) if str(label).startswith(name) else f"{name}: {label}")
        found.append((str(label), expression, sense))
    return problem, found


@contextmanager
def _strict_comparisons(name: str) -> Iterator[None]:
    """While a user's function runs, refuse to use PuLP comparisons as truth values, and let each comparison keep a copy of its expression.

    Python asks for a truth value in `0 <= x <= 1`, `a and b`, `not a` and `if x <= 3`, and PuLP answers True.  `!=` is always True.  In
    PuLP, a comparison refers to its expression, so `c = x <= 1; x += y` would change c; the copy prevents this.
    """
    import pulp

    def refuse(*_: object) -> bool:
        raise UsageError(
            f"rule {name!r}: Python asked whether a comparison or quantity is true, which only the plan decides",
            hint="write two rules for a <= x <= b, one rule each instead of `and`, and no `if`, `not`, `in` or `!=`",
        )

    def copying(compare: Callable[..., Any]) -> Callable[..., Any]:
        return lambda expression, other: compare(expression.copy(), other)

    expression, variable, constraint = pulp.LpAffineExpression, pulp.LpVariable, pulp.LpConstraint
    changes: list[tuple[type, str, Any]] = [(kind, method, refuse) for kind in (expression, variable, constraint) for method in REFUSED]
    changes += [(expression, method, copying(getattr(expression, method))) for method in ("__le__", "__ge__", "__eq__")]
    before = [(kind, method, kind.__dict__.get(method)) for kind, method, _ in changes]
    try:
        for kind, method, new in changes:
            setattr(kind, method, new)
        yield
    finally:
        for kind, method, old in before:
            delattr(kind, method) if old is None else setattr(kind, method, old)


def function_name(function: Callable[..., Any]) -> str:
    """The name of a user's function in messages."""
    return str(getattr(function, "__name__", "") or type(function).__name__)


def _check(problem: Problem, constraint: Any, label: str) -> tuple[Linear, str]:
    """A constraint as expression and sense, after checks for all mistakes that PuLP accepts."""
    import pulp

    if isinstance(constraint, bool | np.bool_):
        raise UsageError(
            f"rule {label!r}: Python evaluated the comparison to {constraint}",
            hint="an empty sum, `!=`, or a number was compared with a number",
        )
    if not isinstance(constraint, pulp.LpConstraint):
        kind = type(constraint).__name__
        forgot = "a comparison is missing: add <= or >=" if kind in ("LpAffineExpression", "LpVariable") else "expected a PuLP comparison"
        raise UsageError(f"rule {label!r}: is a {kind}", hint=forgot)
    expression = problem.translate(constraint)
    if expression.is_constant:
        raise UsageError(f"rule {label!r}: nothing that the plan decides is in it")
    return expression, {-1: "<=", 0: "==", 1: ">="}[constraint.sense]


def _same(a: Linear, b: Linear) -> bool:
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ARRAYS)
    return arrays and a.constant == b.constant and a.soft == b.soft
