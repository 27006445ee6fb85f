"""This script compares file sizes from shapes alone with published ones.

    python benchmarks/sizes.py > benchmarks/results/sizes.md

Nothing is downloaded and nothing is run: a shipped config, the tensor list of its family, and llama-quantize's rules for types.
"""

from __future__ import annotations

import sys
import time

from arguments import make_parser
from peers.mixes import MIXES, mix_types, pure_types, tensor_bytes, with_prediction_block

from edgemoe.model.describe import describe, load_shape

MAPS = "tensor map"
IMPURE = "the source's map below 2 bits is no single type: a few tensors are larger"
OLD = "made by an older llama-quantize, whose rules gave more to some tensors"
CARD = "bartowski's model card"
DYNAMIC = "not llama-quantize's own mix, as far as its size tells"

# Model, with the next-token-prediction block, source, unit in bytes, published size by type ("pure X": X for everything,
# "X, blind": without an imatrix), remark by type.
ROWS: list[tuple[str, bool, str, float, dict[str, float], dict[str, str]]] = [
    ("Qwen3-235B-A22B", False, MAPS, 1, {"pure Q8_0": 249934100480, "pure Q4_K": 132412323840, "pure Q2_K": 77323991040}, {}),
    ("Qwen3.5-35B-A3B", False, MAPS, 1, {"pure Q8_0": 36892150272, "pure Q6_K": 28503163392, "pure Q4_K": 19572951552}, {}),
    ("Qwen3.5-35B-A3B", False, MAPS, 1, {"pure IQ4_XS": 18490501632, "pure Q3_K": 14972539392, "pure Q2_K": 11454577152}, {}),
    ("Qwen3.5-35B-A3B", False, MAPS, 1, {"pure IQ2_XXS": 9019064832, "pure IQ1_M": 7666002432}, {}),
    ("Qwen3.5-122B-A10B", False, MAPS, 1, {"pure Q8_0": 129860935680, "pure Q6_K": 100296732672, "pure IQ4_XS": 65010425856}, {}),
    ("Qwen3.5-122B-A10B", False, MAPS, 1, {"pure IQ2_XXS": 32134803456}, {"pure IQ2_XXS": IMPURE}),
    ("Qwen3.5-397B-A17B", False, MAPS, 1, {"pure Q8_0": 421496351744, "pure IQ4_XS": 211005778944}, {}),
    ("Qwen3.5-397B-A17B", False, MAPS, 1, {"pure IQ2_XXS": 104409873408}, {"pure IQ2_XXS": IMPURE}),
    ("GLM-4.7-Flash", False, MAPS, 1, {"pure Q8_0": 31833324032, "pure Q4_K": 16876321280, "pure Q2_K": 9869918720}, {}),
    ("GLM-4.5-Air", True, MAPS, 1, {"pure Q8_0": 117447146496, "pure Q4_K": 66508733440, "pure Q2_K": 44371483648}, {}),
    ("GLM-4.5-Air", True, MAPS, 1, {"pure IQ1_M": 36039687168}, {}),
    ("GLM-4.6", True, MAPS, 1, {"pure Q8_0": 379308479744, "pure Q4_K": 200953566464, "pure Q2_K": 117349700864}, {}),
    ("GLM-4.6", True, MAPS, 1, {"pure IQ1_S": 70346298624}, {"pure IQ1_S": IMPURE}),
    ("DeepSeek-V3", False, MAPS, 1, {"pure Q4_K": 377885689856, "pure Q2_K": 220695024640, "pure IQ1_M": 147369230336}, {}),
    ("Kimi-K2", False, MAPS, 1, {"pure Q4_K": 577957857280, "pure Q2_K": 337460360192, "pure IQ1_S": 201288318464}, {"pure IQ1_S": IMPURE}),
    ("GLM-5.2", True, MAPS, 1, {"pure Q8_0": 800767795200, "pure Q4_K": 424225333248, "pure IQ2_XXS": 194821220352}, {}),
    ("Mixtral-8x7B", False, "llama.cpp #4406 (2023)", 2**30, {"Q8_0": 46.22, "Q6_K": 35.74}, {}),
    (
        "Mixtral-8x7B",
        False,
        "llama.cpp #4406 (2023)",
        2**30,
        {"Q5_K_M": 30.02, "Q4_K_M": 24.62, "Q3_K_M": 18.96, "Q2_K": 14.57},
        dict.fromkeys(
            ("Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"), "experts were single tensors then, and few of them got the mix's larger type"
        ),
    ),
    (
        "Mixtral-8x7B",
        False,
        "ymcui/Chinese-Mixtral #26 (same shape)",
        1e9,
        {"Q8_0": 49.6, "Q6_K": 38.4, "Q5_K_M": 33.2, "Q4_K_M": 28.4, "IQ4_XS": 25.1, "Q3_K_M": 22.5, "IQ3_XXS": 18.3, "Q2_K": 17.3}
        | {"IQ2_XXS": 12.3, "IQ1_S": 9.8},
        {"IQ2_XXS": OLD.replace("more", "less")},
    ),
    (
        "Mixtral-8x22B",
        False,
        CARD,
        1e9,
        {"Q5_K_M": 99.96, "Q4_K_M": 85.58, "Q4_K_S": 80.47, "IQ4_XS, blind": 76.35, "Q3_K_M": 67.78, "IQ3_XS": 58.22} | {"Q2_K": 52.10},
        {"IQ4_XS, blind": "with an imatrix 75.485"},
    ),
    ("Qwen3-30B-A3B", False, CARD, 1e9, {"Q8_0": 32.48, "Q6_K": 25.10, "Q5_K_M": 21.74, "Q5_K_S": 21.10}, {}),
    ("Qwen3-30B-A3B", False, CARD, 1e9, {"IQ4_XS, blind": 16.6}, {"IQ4_XS, blind": "with an imatrix 16.362"}),
    ("GLM-4.5-Air", True, "ubergarm's model card", 2**30, {"Q8_0": 109.381}, {}),
    ("Granite-3.0-1B-A400M", False, "onnxruntime/mobius #575, file size", 1, {"Q4_K_M": 821845024}, {"Q4_K_M": "header and vocabulary"}),
    ("DeepSeek-V3", False, "llama.cpp #12727", 1e9, {"Q2_K": 244.93, "IQ2_M": 217.43}, {"Q2_K": "published as Q2_K_L"}),
    ("DeepSeek-V3", False, "llama.cpp #11446", 2**30, {"Q5_K_S": 441, "Q4_K_S": 365, "IQ4_XS": 345}, dict.fromkeys(MIXES, OLD)),
    ("MiniMax-M2", False, "llmgarage's model card", 1e9, {"IQ2_M": 78.1}, {"IQ2_M": DYNAMIC}),
    ("Qwen3.5-35B-A3B", False, "APEX README", 2**30, {"Q5_K_S": 23.1, "Q3_K_M": 15.1, "IQ2_M": 11.3}, dict.fromkeys(MIXES, DYNAMIC)),
]


def main() -> None:
    """Print the table."""
    make_parser(__doc__).parse_args()
    start, exact, close, lines = time.perf_counter(), 0, 0, []
    for name, mtp, source, unit, published, remarks in ROWS:
        model = with_prediction_block(name) if mtp else describe(load_shape(name), name)
        for kind, size in published.items():
            mix, _, blind = kind.partition(", ")
            pure = mix.removeprefix("pure ")
            types = pure_types(model, pure) if pure != mix else mix_types(model, mix, imatrix=not blind)
            found = tensor_bytes(model, types) / unit
            error = found / size - 1
            exact += found == size
            close += abs(error) <= 0.005
            shown = (f"{size:,.0f} B", f"{found:,.0f} B") if unit == 1 else (f"{size:g} {'GiB' if unit == 2**30 else 'GB'}", f"{found:.3f}")
            verdict = "exact" if found == size else f"{error:+.2%}"
            lines.append(
                f"| {name}{' + MTP' if mtp else ''} | {kind} | {shown[0]} | {shown[1]} | {verdict} | {remarks.get(kind, '')} | {source} |"
            )
    print("# File sizes from shapes alone\n")
    print("`python benchmarks/sizes.py`: bytes of all tensors by our rules, beside what others published.  Pure: one type for everything,")
    print(
        "vectors and routers F32, fallbacks where rows do not divide.  Others: llama-quantize's mixes of llama.cpp 0c1e570, with an imatrix"
    )
    print("(blind: without).  Tensor maps: Thireus/GGUF-Tool-Suite @ 384c1f85, sums over all tensors.")
    print("Reasons for errors above 0.5 % are our reading, unless a source says so; published files are not at hand.\n")
    print(f"{len(lines)} files: {exact} exact to the byte, {close} within 0.5 %.\n")
    print("| model | type | published | ours | error | remark | source |\n|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
