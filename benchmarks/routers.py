"""How long does the sum over the routers after a layer take in a model of DeepSeek-V3's shape, summed anew for every layer or updated?

Random routers of the right shape are written to a temporary file; nothing else of the model is needed.
"""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from arguments import make_parser
from table import head, made_by, row, save

from edgemoe.base.units import format_bytes
from edgemoe.ir import Model
from edgemoe.model.describe import describe, load_shape
from edgemoe.repair.router_gram import RouterGram

COMMAND = "python benchmarks/routers.py"


def with_routers(model: Model, folder: Path) -> Model:
    """The model with its routers and their norms in a file of random numbers, and without its other tensors."""
    rng, placed, offset = np.random.default_rng(0), [], 0
    with (folder / "routers.bin").open("wb") as file:
        for tensor in (t for t in model.tensors if t.role in ("ffn_gate_inp", "ffn_norm")):
            file.write(rng.standard_normal(tensor.shape, dtype=np.float32).tobytes())
            placed.append(replace(tensor, dtype="F32", file="routers.bin", offset=offset))
            offset += 4 * tensor.n_weights
    return replace(model, folder=str(folder), tensors=tuple(placed))


def main() -> None:
    """Time both ways and save the table."""
    parser = make_parser(__doc__, results="routers.md")
    parser.add_argument("--shape", default="DeepSeek-V3", help="name of a shipped shape")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = with_routers(describe(load_shape(args.shape), args.shape), Path(folder))
        layers = model.moe_layers
        start = time.perf_counter()
        RouterGram(model).from_layer(layers[0])
        one = (time.perf_counter() - start) / len(layers)
        start, routers = time.perf_counter(), RouterGram(model)
        for layer in layers:
            routers.from_layer(layer)
            routers.from_layer(layer + 1)
        took = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = [
        f"# The sum over the routers after each layer, {args.shape}",
        "",
        f"{len(layers)} routers of {model.n_experts} experts, hidden size {model.hidden_size:,}; {made_by(COMMAND, 'cores')}.",
        f"The process held {format_bytes(peak)} at its peak.  A sum made anew takes one product for each router after the layer, so its",
        f"time is extrapolated from the first sum, which took {one:.2f} s a product.",
        "",
        *head(["way", "products", "seconds of a build"]),
        row(["made anew, twice a layer", f"{len(layers) ** 2:,}", f"{one * len(layers) ** 2:,.0f}"]),
        row(["updated from layer to layer", 2 * len(layers), f"{took:,.0f}"]),
        "",
    ]
    print(save(args.results, "routers.md", lines))


if __name__ == "__main__":
    main()
