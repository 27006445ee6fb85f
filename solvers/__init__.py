"""The integer program and its solvers."""
