"""This script solves programs with HiGHS in a process of its own, which the planner can end at any moment.

    python -P highs_child.py

HiGHS cannot always be stopped from inside: some programs send it into a loop that sees neither its time limit nor an interrupt.  Jobs come
through standard input and answers go through standard output, each as a pickle behind its length in 8 bytes.  The script imports
nothing of edgemoe, and ends when its input ends.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import struct
import sys
import threading
import time
from typing import IO, Any

import numpy as np

EVERY = 0.2  # seconds between two reports of the gap


def read(stream: IO[bytes]) -> Any:
    """The next object; None at the end."""
    head = stream.read(8)
    return pickle.loads(stream.read(struct.unpack("<Q", head)[0])) if len(head) == 8 else None


def write(stream: IO[bytes], thing: Any) -> None:
    """Send an object."""
    packed = pickle.dumps(thing, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(struct.pack("<Q", len(packed)) + packed)
    stream.flush()


def make_model(job: dict[str, Any]) -> Any:
    """The program of a job, whose matrix lies row by row."""
    import highspy

    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = len(job["cost"]), len(job["row_lower"])
    model.col_cost_, model.col_lower_, model.col_upper_ = job["cost"], job["lower"], job["upper"]
    model.row_lower_, model.row_upper_ = job["row_lower"], job["row_upper"]
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_, model.a_matrix_.index_, model.a_matrix_.value_ = job["start"], job["index"], job["value"]
    if job["integer"] is not None:
        kinds = {True: highspy.HighsVarType.kInteger, False: highspy.HighsVarType.kContinuous}
        model.integrality_ = [kinds[bool(whole)] for whole in job["integer"]]
    return model


def solve(job: dict[str, Any], out: IO[bytes]) -> dict[str, Any]:
    """Solve one program; send ("gap", gap, bound) and ("better", values) on the way, and return what is known at the end."""
    import highspy

    highs: Any = highspy.Highs()  # type: ignore[no-untyped-call,unused-ignore]
    for name, value in {"output_flag": False, "threads": 1, "random_seed": 0, **job["options"]}.items():
        highs.setOptionValue(name, value)
    if highs.passModel(make_model(job)) == highspy.HighsStatus.kError:
        return {"status": "refused"}
    last = time.monotonic()

    def report(event: Any) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            write(out, ("gap", event.data_out.mip_gap, event.data_out.mip_dual_bound))

    def improve(event: Any) -> None:
        write(out, ("better", np.array(event.data_out.mip_solution)))

    if job["integer"] is not None:
        highs.cbMipInterrupt.subscribe(report)
        highs.cbMipImprovingSolution.subscribe(improve)
    highs.run()
    info, solution = highs.getInfo(), highs.getSolution()
    return {
        "status": highs.getModelStatus().name,
        "objective": info.objective_function_value,
        "bound": info.mip_dual_bound,
        "values": np.array(solution.col_value),
        "duals": np.array(solution.row_dual),
    }


def main() -> None:
    """Solve jobs until the input ends, also if it ends during a job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process then
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # HiGHS prints its banner whatever its options say
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        while (job := read(sys.stdin.buffer)) is not None:
            jobs.put(job)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        write(out, ("done", solve(jobs.get(), out)))


if __name__ == "__main__":
    main()
