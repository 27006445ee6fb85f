"""Does every reader refuse hostile inputs as it should?  Thousands of mutated files, and a table of what came of them.

    python benchmarks/fuzz.py [--count 20000] [--seed 0] [--only READER ...]

The inputs and the readers are those of tests/fuzz_readers.py, of which every test run tries 2000.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))


def main() -> None:
    """Fuzz from the command line."""
    from fuzz_readers import Readers, fuzz, peak_memory

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        readers = {name: reader for name, reader in Readers(Path(folder)).all().items() if not options.only or name in options.only}
        before, began = peak_memory(), time.monotonic()
        found = fuzz(readers, options.count, options.seed)
    print("| reader | inputs | taken | refused | wrong |\n|---|---|---|---|---|")
    for name, result in found.items():
        print(f"| {name} | {result.taken + result.refused + len(result.wrong)} | {result.taken} | {result.refused} | {len(result.wrong)} |")
    print(f"\n{options.count} inputs, {time.monotonic() - began:.0f} s, {(peak_memory() - before) / 2**20:.0f} MiB more memory at the peak")
    for name, result in found.items():
        kinds = Counter(line.partition(": ")[2] for line in result.wrong)
        for kind, times in kinds.most_common(20):
            print(f"{name}: {times} times: {kind}; first: {next(line for line in result.wrong if kind in line).partition(':')[0]}")
    sys.exit(any(result.wrong for result in found.values()))


if __name__ == "__main__":
    main()
