"""Benchmarks take their common options from here, each with one name and one meaning."""

from __future__ import annotations

import argparse
from pathlib import Path

RESULTS = Path("benchmarks/results")


def make_parser(
    doc: str | None, *, work: bool = False, tokens: int = 0, calibration_tokens: int = 0, results: str = ""
) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, with the common options that are asked for.

    Args:
        doc: the script's docstring.
        work: take --work.
        tokens: take --tokens, with this default.
        calibration_tokens: take --calibration-tokens, with this default.
        results: take --results; what goes there.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if work:
        parser.add_argument("--work", type=Path, default=Path("bench"), help="what takes long is kept here between runs")
    if tokens:
        parser.add_argument("--tokens", type=int, default=tokens, help="held-out tokens of all five texts")
    if calibration_tokens:
        parser.add_argument("--calibration-tokens", type=int, default=calibration_tokens, help="of all calibration texts")
    if results:
        parser.add_argument("--results", type=Path, default=RESULTS, help=f"where {results} goes")
    return parser
