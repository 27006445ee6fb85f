"""The six records that the stages pass on: Model -> Stats -> Costs -> Plan -> Artifact -> Report.

Every record is made by one stage and never changed after.  storage.py saves them and opens them again.
Sizes are bytes, costs are nats of KL(original || compressed) per token, counts are tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.base.storage import array_file, load_arrays
from edgemoe.ir.check_costs import check_costs

PROJECTIONS = ("gate", "up", "down")
MODEL_FILES = (".gguf", ".onnx", ".onnx.data", ".onnx_data")

_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


# ---------------------------------------------------------------------------------------------------------------- Model
@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One matrix or vector of the checkpoint, as bytes in a file; an expert inside a stacked tensor is a Tensor of its own."""

    name: str  # as in the checkpoint
    role: str  # the field's name, as llama.cpp spells it: attn_q, ffn_gate_exps, ffn_gate_inp (router), token_embd ...
    layer: int = -1  # -1: outside the layers
    expert: int = -1  # -1: not an expert's
    shape: tuple[int, ...]
    dtype: str  # BF16, F16, F32 or F64
    file: str
    offset: int  # of the first byte in the file
    packed: str = ""  # format of a target in which the file holds the rows already, ready to be copied; empty: plain `dtype`

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes in the checkpoint."""
        return self.n_weights * _DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What the headers of a checkpoint say.  `fingerprint` is a SHA-256 over config, tokenizer, headers and samples of the data."""

    folder: str
    name: str
    model_type: str
    config: dict[str, Any]
    n_layers: int
    hidden_size: int
    vocab_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_experts: int
    top_k: int
    expert_size: int
    renormalize: bool  # gates of the top-k are divided by their sum
    context_length: int
    tensors: tuple[Tensor, ...]
    fingerprint: str

    @property
    def own_top_k(self) -> int:
        """Experts that the checkpoint's router picks, where `top_k` says that fewer are wanted."""
        return int(self.config.get("num_experts_per_tok", self.top_k))

    @property
    def n_weights(self) -> int:
        """All weights of the model."""
        return sum(t.n_weights for t in self.tensors)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors in the checkpoint."""
        return sum(t.n_bytes for t in self.tensors)

    def find(self, role: str, layer: int = -1, expert: int = -1) -> Tensor | None:
        """The tensor with this role, or None."""
        return next((t for t in self.tensors if (t.role, t.layer, t.expert) == (role, layer, expert)), None)

    def of_layer(self, layer: int) -> dict[tuple[str, int], Tensor]:
        """The tensors of one layer by (role, expert); layer -1 holds embedding, output and the last norm."""
        return {(t.role, t.expert): t for t in self.tensors if t.layer == layer}


# ---------------------------------------------------------------------------------------------------------------- Stats
@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One perturbed copy of the stream: what was changed, and the KL that it caused, by domain (nats per token)."""

    kind: str  # round (one tensor at `bits`), drop (keep `kept` in `layer`), all (every matrix at `bits`)
    role: str = ""
    layer: int = -1
    bits: int = 0
    kept: tuple[int, ...] = ()
    kl: tuple[float, ...] = ()  # [domains]


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """One calibration text, its weight in every mean, and how many of its tokens were used."""

    name: str
    weight: float
    tokens: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What calibration saw.  Arrays lie in `folder`, one file per layer, and are read when asked for.

    Arrays of a layer (D domains, E experts, H hidden, M expert size, N replay tokens, K candidates; sums run over tokens):
        count [D, E]; gate, gate_sq, norm, norm_sq, gate_norm, energy, residual [D, E] (sums of g, g^2, |f|, |f|^2, g|f|, g^2|f|^2 and
        g|f|(1 - cos) over routed tokens, cos between the stream before and after the experts); attn_in_sq [D, H],
        attn_out_sq [D, heads * head_dim] (sums of x^2); expert_in_sq [E, H], expert_mid_sq [E, M] (sums of g^2 x^2 over routed tokens,
        domains weighted: the importance matrix); expert_out [E, H] (sums of f, domains weighted so);
        replay_x [N, H] (the MoE block's inputs), replay_logits [N, E], replay_domain [N], replay_stream [N] (|s|^2 of the residual stream
        after the layer), candidates [N, K], gram [N, K(K+1)/2].
    Arrays of layer -1: token_count [D, V], output_in_sq [D, H], replay_fisher [N] (watch.py: what a change of the last state costs).
    """

    folder: str
    model: str  # fingerprint
    key: str  # SHA-256 of the model, the texts and the settings
    settings: dict[str, Any]
    domains: tuple[Domain, ...]
    probes: tuple[Probe, ...]
    cold: tuple[tuple[int, int], ...]  # (layer, expert) with too few tokens to be judged alone

    def arrays(self, layer: int) -> dict[str, NDArray[Any]]:
        """The arrays of one layer; -1 for those outside the layers."""
        return load_arrays(Path(self.folder) / array_file(layer))

    @property
    def weights(self) -> NDArray[np.float64]:
        """Weight of each domain [D], summing to 1."""
        weights = np.array([d.weight for d in self.domains], dtype=np.float64)
        result: NDArray[np.float64] = weights / weights.sum()
        return result


# ---------------------------------------------------------------------------------------------------------------- Costs
@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What gets one format: a matrix; the stack of one projection of all kept experts of a layer; or one expert."""

    name: str  # in the artifact
    role: str
    layer: int
    n_weights: int  # with every expert kept
    expert: int = -1  # in the experts form: whose matrices these are
    cols: int = 0  # length of a row; 0 where the matrices differ

    @property
    def is_stack(self) -> bool:
        """Whether the unit's size depends on how many experts stay."""
        return self.expert < 0 and self.role.endswith("_exps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Price list: nats and bytes of every choice.

    Two forms.  "stacks" (stock GGUF): one kept count for all layers, a kept set for each layer, a format for each stack and other tensor.
    "experts": every expert is dropped or gets a format of its own, kept counts are free; there is one count, with every expert kept.

    D domains, C kept counts, L layers, E experts, U units, F formats.  All costs are nats of KL per token.
    `cost` [C, U, F] (inf: not offered), mean over domains by weight; in domain d a unit costs `factor[d, u]` times as much.  `input_cost`
    [C, U, F]: what of it comes from inputs that the runtime's kernels round; 0 where that was not priced apart.
    `size`, `extra`, `staging` [C, U, F]: bytes in the artifact, those that the process holds beyond them, and of the copy that loading
    needs.  `fixed_size` [C]: header, norms, routers.
    `kept` [C, L, E]: the menu, a kept set of each layer for each count; `drop_cost` [D, C, L]: what these sets cost.
    `expert_drop` [D, L, E]: additive price of each expert, for sets that are not on the menu; `drop_curve` [L, E + 1]: nats on top of it
    when k experts of a layer are gone.  `usage` [D, L, E]: an expert's share of its layer's output (sum of g |f|) in each domain.
    KL is predicted as Q + kappa sqrt(Q), where Q is the sum of the costs (docs/pricing.md, 5).
    """

    model: str
    model_name: str
    stats: str
    target: str
    form: str
    formats: tuple[str, ...]
    units: tuple[Unit, ...]
    counts: tuple[int, ...]
    n_experts: int
    top_k: int
    kappa: float
    memory: dict[str, int]  # what the process needs beside the weights: see memory.py
    cold: tuple[tuple[int, int], ...]
    domains: tuple[str, ...]
    domain_weights: tuple[float, ...]  # summing to 1
    origin: str = ""  # where prices come from when this model was not measured
    repair: bool = False  # drops are priced as they are after the survivors' repair
    n_groups: int = 1  # routing groups (consecutive experts) of which as many of each must stay
    width: int = 0  # neurons that every expert is cut to; 0: as in the checkpoint
    cost: NDArray[np.float64] = field(compare=False)
    input_cost: NDArray[np.float64] = field(compare=False)
    size: NDArray[np.int64] = field(compare=False)
    extra: NDArray[np.int64] = field(compare=False)
    staging: NDArray[np.int64] = field(compare=False)
    fixed_size: NDArray[np.int64] = field(compare=False)
    factor: NDArray[np.float64] = field(compare=False)
    kept: NDArray[np.bool_] = field(compare=False)
    drop_cost: NDArray[np.float64] = field(compare=False)
    expert_drop: NDArray[np.float64] = field(compare=False)
    drop_curve: NDArray[np.float64] = field(compare=False)
    usage: NDArray[np.float64] = field(compare=False)

    def __post_init__(self) -> None:
        check_costs(self)

    @property
    def n_layers(self) -> int:
        """Layers that have experts."""
        return int(self.expert_drop.shape[1])

    @property
    def expert_layers(self) -> list[int]:
        """Which layers these are, as tensor names count them (leading dense layers have none)."""
        return sorted({u.layer for u in self.units if u.is_stack or u.expert >= 0})

    @property
    def weights(self) -> NDArray[np.float64]:
        """Weight of each domain [D]."""
        return np.array(self.domain_weights)

    @property
    def inherited(self) -> NDArray[np.float64]:
        """Nats that rounding costs the tokens of an expert that goes, by domain [D, L, E]; zeros in the stacks form, where it is in `cost`.

        Others serve them then, rounded too: at what the expert itself would cost in its smallest format.  Without it a drop would seem to
        save the error that its expert is stored with.
        """
        found, rows = np.zeros(self.expert_drop.shape), {layer: row for row, layer in enumerate(self.expert_layers)}
        smallest = np.where(np.isfinite(self.cost[0]), self.size[0], np.iinfo(np.int64).max).argmin(axis=1)
        place = [(u, rows[unit.layer], unit.expert) for u, unit in enumerate(self.units) if unit.expert >= 0]
        if place:
            u, row, expert = np.array(place).T
            found[:, row, expert] = self.factor[:, u] * self.cost[0, u, smallest[u]]
        return found

    def kept_weights(self, u: int, c: int) -> int:
        """Weights of a unit at one kept count."""
        unit = self.units[u]
        return unit.n_weights * self.counts[c] // self.n_experts if unit.is_stack else unit.n_weights

    def predict_kl(self, q: float) -> float:
        """KL in nats per token that is expected of a plan whose costs add up to `q`."""
        return q + self.kappa * math.sqrt(max(q, 0.0))


# ----------------------------------------------------------------------------------------------------------------- Plan
@dataclass(frozen=True, slots=True, kw_only=True)
class CountBound:
    """What the search learned about one kept count."""

    count: int
    bound: float | None  # no plan with this count costs less (nats); None: cannot fit
    cost: float | None  # the best plan found with it


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleUse:
    """A user's rule in a plan: its name, and how much room it leaves (in the rule's own unit; None where that has no meaning)."""

    name: str
    slack: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which experts stay, and the format of every unit.  `proven`: the solver proved that no plan is better by more than the asked gap."""

    model: str
    model_name: str
    costs: str
    target: str
    budget: int
    context: int
    solver: str
    objective: str  # "mean" over domains, or the "worst" domain
    n_experts: int
    top_k: int
    kept: tuple[tuple[int, ...], ...]  # [layers with experts], original indices in order
    formats: dict[str, str]  # unit name -> format
    sizes: dict[str, int]  # unit name -> bytes
    vram: tuple[str, ...]  # units that live in the second pool, GPU memory
    file_size: int
    memory: dict[str, int]  # predicted, by part; "peak" is their sum as the process sees it
    q: float  # sum of the costs, mean over domains
    drop_q: float
    predicted_kl: float
    domain_q: dict[str, float]  # sum of the costs in each domain
    bound: float  # of the objective
    gap: float
    proven: bool
    price: float  # nats that one more byte would save (Lagrange multiplier of the budget)
    counts: tuple[CountBound, ...]
    rules: tuple[RuleUse, ...]
    repair: bool  # the survivors are to be repaired after the drop: that is how it was priced
    origin: str  # where prices come from when this model was not measured
    width: int = 0  # neurons that every expert is cut to; 0: as in the checkpoint

    def __post_init__(self) -> None:
        for layer, kept in enumerate(self.kept):
            if list(kept) != sorted(set(kept)) or any(not 0 <= e < self.n_experts for e in kept):
                raise ModelError(f"plan: layer {layer} keeps {kept}, which are not some of {self.n_experts} experts in order")
            if not self.top_k <= len(kept):
                raise ModelError(f"plan: layer {layer} keeps {len(kept)} experts, but the router picks {self.top_k}")

    def check_experts(self, model: Model) -> None:
        """Refuse a model whose experts are wider than the plan wants them, or whose router picks another number.

        Raises:
            ModelError: names both widths, or both numbers.
        """
        if self.top_k != model.top_k:
            found = f"{model.folder} has {model.top_k}"
            raise ModelError(
                f"the plan is for {self.top_k} active experts, {found}", hint=f"`edgemoe build --top-k {self.top_k}` has so many"
            )
        if self.width not in (0, model.expert_size):
            found = f"{model.folder} has {model.expert_size}"
            raise ModelError(
                f"the plan is for experts of {self.width} neurons, {found}", hint=f"`edgemoe build --width {self.width}` cuts them"
            )

    @property
    def count(self) -> int:
        """Kept experts of a layer; the most of any layer where they differ."""
        return max(map(len, self.kept), default=0)

    @property
    def layers(self) -> list[int]:
        """Which layers the rows of `kept` are, as tensor names count them (leading dense layers have no experts)."""
        found = {int(name.split(".")[1]) for name in self.formats if name.startswith("blk.") and "_exps" in name}
        return sorted(found) if len(found) == len(self.kept) else list(range(len(self.kept)))

    @property
    def active_bytes(self) -> int:
        """Bytes of weights that a token reads: top-k experts of each layer, all other tensors but the embedding."""
        kept = dict(zip(self.layers, map(len, self.kept), strict=True))
        total = Fraction(0)
        for name, size in self.sizes.items():
            if "_exps" in name:
                total += Fraction(size * self.top_k, kept.get(int(name.split(".")[1]), max(self.count, 1)))
            elif not name.startswith("token_embd"):
                total += size
        return int(total)

    @property
    def has_one_count(self) -> bool:
        """Whether every layer keeps as many experts."""
        return len(set(map(len, self.kept))) <= 1


# ------------------------------------------------------------------------------------------------------ Artifact, Report
@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFile:
    """One file of an artifact, named relative to the output folder."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """What was written; the first file is the one to load."""

    folder: str
    target: str
    plan: str
    files: tuple[ArtifactFile, ...]

    @property
    def path(self) -> Path:
        """The file to load."""
        return Path(self.folder) / self.files[0].name

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)

    @property
    def model_size(self) -> int:
        """Bytes of the files that hold the model: what a plan's file_size promises; small files beside them are not counted."""
        return sum(f.size for f in self.files if f.name.endswith(MODEL_FILES))


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScore:
    """How the artifact does on one held-out text, against the original.  KL in nats per token; perplexities per token."""

    name: str
    tokens: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    perplexity: float
    original_perplexity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round of refinement: what a plan and its drops alone should cost by their prices, and after a measurement (nats per token).

    `expected`: on other text, after a measurement on calibration text (`refine.expect`).  The factors are those by which prices of drops
    and of formats were then multiplied.
    """

    predicted: float
    expected: float
    predicted_drops: float
    expected_drops: float
    count: int
    file_size: int
    drop_factor: float
    format_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was promised and what was measured; everything the report page shows."""

    model: dict[str, Any]
    plan: Plan
    artifact: Artifact
    units: tuple[Unit, ...]  # those that the plan stores
    scores: tuple[TextScore, ...]
    measured_kl: float
    measured_peak: int
    beside_kl: float  # under the target's other settings (Target.RUNS), from a few windows
    prompt_tokens_per_second: float
    decode_tokens_per_second: float
    decode_ceiling: float  # tokens per second that this machine's measured bandwidth would allow: an estimate, from bytes read per token
    samples: tuple[dict[str, Any], ...]
    frontier: tuple[dict[str, float], ...]  # predicted KL of the best plan at other sizes
    problems: tuple[str, ...]
    runtime: str
    machine: str
    rounds: tuple[Round, ...] = ()  # how the plan came about, where it was refined
