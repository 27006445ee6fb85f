"""This module holds the parts of a planning problem that stay the same while budgets and staging limits are tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from edgemoe.ir import Costs
from edgemoe.plan.program import Compiled, Near, compile_program
from edgemoe.rules.constraints import Constraints
from edgemoe.solvers.effort import Effort
from edgemoe.solvers.program import Solution
from edgemoe.solvers.search import search, solve

ROUGH = 0.01  # gap of a first answer that only shows whether staging copies matter

MOST_PROGRAMS = 2**28  # bytes of programs that are kept between their uses


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The parts that stay the same while budgets and staging limits are tried."""

    costs: Costs
    constraints: Constraints
    allowed: tuple[int, ...]  # kept counts, by index
    objective: str
    near: Near | None
    effort: Effort
    made: dict[int, Compiled] = field(default_factory=dict)  # programs without room, by their place in `allowed`

    def programs(self, room: int, staging: int | None = None) -> Callable[[int], Compiled]:
        """Compiled programs by their place in `allowed`."""

        def program(i: int) -> Compiled:
            if i not in self.made:
                made = compile_program(self.costs, self.constraints, self.allowed[i], objective=self.objective, near=self.near)
                self.made[i] = made
                while len(self.made) > 2 and len(self.made) * made.program.cost.nbytes > MOST_PROGRAMS:
                    del self.made[next(iter(self.made))]
            return self.made[i].within(room, staging)

        return program

    def solve(self, room: int, gap: float) -> tuple[Solution, Compiled] | None:
        """The best choice with this room, and the program that it belongs to; None when there is none."""
        compiled = self.programs(room)
        found = solve(lambda i: compiled(i).program, len(self.allowed), replace(self.effort, gap=gap))
        return None if found is None else (found, compiled(found.count_index))

    def improve(self, room: int, staging: int, cutoff: float) -> tuple[tuple[Solution, Compiled] | None, float]:
        """The best choice with copies up to `staging` and a cost below `cutoff`, if there is one, and a bound of all such choices."""
        compiled = self.programs(room, staging)
        found, bound = search(lambda i: compiled(i).program, len(self.allowed), self.effort, cutoff=cutoff)
        return (None if found is None else (found, compiled(found.count_index))), bound


def make_task(costs: Costs, constraints: Constraints, effort: Effort, objective: str = "mean", near: Near | None = None) -> Task:
    """A task with the kept counts that the rules allow."""
    allowed = tuple(c for c, yes in constraints.counts.items() if yes)
    return Task(costs=costs, constraints=constraints, allowed=allowed, objective=objective, near=near, effort=effort)


def memory_beside_weights(costs: Costs, constraints: Constraints) -> dict[str, int]:
    """Memory parts of main memory; with a GPU the cache and the buffers lie in GPU memory instead."""
    return costs.memory if constraints.vram is None else {**costs.memory, "kv": 0, "compute": 0}
