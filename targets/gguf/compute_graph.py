"""This module computes the bytes of llama.cpp's compute buffer for a Model and settings, and the bytes of it that decoding touches.

It builds the graph of one batch operation by operation as llama.cpp does (src/llama-graph.cpp, src/models/qwen3moe.cpp, olmoe.cpp,
llama.cpp, deepseek2.cpp, openai-moe.cpp of 0c1e570), with shapes instead of numbers, and lays it out as ggml does (allocator.py).
"""

from __future__ import annotations

import math

from edgemoe.base.errors import UsageError
from edgemoe.ir import Model
from edgemoe.ir.memory import Settings
from edgemoe.ir.model import Cache
from edgemoe.targets.gguf.allocator import OUTSIDE, Graph, Node, given, inplace, op, view
from edgemoe.targets.gguf.kv_cache import KV_FORMATS, cells_of, check, rows_of, window_cells


def compute_bytes(model: Model, settings: Settings, *, outputs: int = 0) -> int:
    """Bytes of the compute buffer that llama.cpp reserves for a batch.

    Args:
        model: with its shapes; recurrent layers are not supported.
        settings: of the run.
        outputs: rows of logits that are reserved for a batch; 0 stands for one row per token, which is llama.cpp's default.

    Raises:
        UsageError: a layer is recurrent.
    """
    return _Batch(model, settings, outputs).graph.lay_out()


def touched_bytes(model: Model, settings: Settings) -> int:
    """Bytes of the compute buffer that decoding writes if only the last row's logits are computed.

    The buffer is laid out for the logits of every row, but memory is held only where something is written.
    """
    whole = _Batch(model, settings, 0).graph
    size = whole.lay_out()
    return size if settings.every_logit else whole.touched(_Batch(model, settings, settings.sequences).graph)


def work_bytes(model: Model, settings: Settings) -> int:
    """Bytes of ggml's work buffer: the right operand of the largest product, in at most 16 bits (ggml_graph_plan in ggml-cpu.c).

    Products with expert stacks also list the rows of each expert, with 8 bytes a row.  Without flash attention the scores are such an
    operand, and they are converted if the cache is quantized or has 16 bits.
    """
    rows, heads = (
        rows_of(settings),
        model.attention.heads * max(model.attention.key_length, model.attention.value_length, model.attention.latent),
    )
    chosen = model.top_k * rows
    dense = rows * max(model.hidden_size, heads, model.dense_size, model.shared_size)
    experts = max(chosen * model.expert.size, rows * model.hidden_size)
    scores = 0 if settings.flash or settings.kv_v == "F32" else rows * model.attention.heads * cells_of(settings)
    return max(2 * dense, 2 * experts + 8 * chosen, 2 * scores)


def _norm(x: Node) -> Node:
    return inplace(x.shape, inplace(x.shape, x), OUTSIDE)


def _matmul(x: Node, width: int) -> Node:
    return op((width, *x.shape[1:]), OUTSIDE, x)


def _dense(x: Node, size: int) -> Node:
    """Gate, up, down (build_ffn)."""
    up, gate = _matmul(x, size), _matmul(x, size)
    return _matmul(op(up.shape, gate, up), x.shape[0])


def _turn(x: Node, turn: Node) -> Node:
    """Rotation that makes rows easier to quantize (llama_mul_mat_hadamard)."""
    flat = (turn.shape[0], math.prod(x.shape) // turn.shape[0])
    return view(op(flat, turn, view(x, flat)), x.shape)


class _Batch:
    """The graph of one batch of tokens through all layers."""

    def __init__(self, model: Model, settings: Settings, outputs: int) -> None:
        check(model, settings)
        if any(cache.state for cache in model.caches):
            raise UsageError("the compute buffer of recurrent layers is not predicted", hint="plan for a model of attention layers alone")
        self.model, self.settings, self.graph = model, settings, Graph()
        streams = settings.sequences
        self.rows = -(-rows_of(settings) // streams) * streams
        self.outputs = min(self.rows, outputs or self.rows)
        self.positions, self.out_ids = given((self.rows,)), given((self.outputs,))
        self.inputs = {window: self._attention_inputs(window) for window in {cache.window for cache in model.caches}}
        tokens, embeddings = given((self.rows,)), given((model.hidden_size, self.rows))
        embeddings.unused = True
        hidden = self.graph.expand(op((model.hidden_size, self.rows), OUTSIDE, tokens))
        self.graph.expand(embeddings)  # the input for embeddings, instead of tokens, has a place too
        self.late = any(cache.window for cache in model.caches)  # gpt-oss picks the wanted rows after the last layer, others before it
        for number in range(len(model.caches)):
            hidden = self._layer(hidden, number)
        self._head(self._pick(hidden) if self.late else hidden)

    def _attention_inputs(self, window: int) -> dict[str, Node]:
        """The attention mask, and the indices of the cells for keys and values."""
        settings, streams = self.settings, self.settings.sequences
        cells = window_cells(settings, window)
        v_width = 1 if settings.flash else max(cache.v for cache in self.model.caches)
        found = {
            "mask": given((cells, self.rows // streams, 1, streams), 2 if settings.flash else 4),
            "k_ids": given((self.rows,), 8),
            "v_ids": given((self.rows * v_width,), 8),
        }
        if KV_FORMATS[settings.kv_k].block > 1 and self.model.attention.key_length % 64 == 0 and not self.model.attention.latent:
            turn = 64
            while self.model.attention.key_length % (2 * turn) == 0:
                turn *= 2
            found["k_turn"] = given((turn, turn))
        if KV_FORMATS[settings.kv_v].block > 1 and self.model.attention.value_length % 64 == 0 and not self.model.attention.latent:
            found["v_turn"] = given((64, 64))
        return found

    def _layer(self, hidden: Node, number: int) -> Node:
        model, cache = self.model, self.model.caches[number]
        mixed = (self._latent_attention if model.attention.latent else self._attention)(_norm(hidden), cache)
        if number == len(model.caches) - 1 and not self.late:
            mixed, hidden = self._pick(mixed), self._pick(hidden)
        total = inplace(mixed.shape, mixed, hidden)
        x = _norm(total)
        if model.layers[number].ffn == "dense":
            return inplace(total.shape, _dense(x, model.dense_size), total)
        out = self._experts(x)
        if model.shared_size:
            out = inplace(out.shape, out, _dense(x, model.shared_size))
        return inplace(total.shape, out, total)

    def _pick(self, x: Node) -> Node:
        """The rows whose logits are wanted."""
        return op((x.shape[0], self.outputs), x, self.out_ids)

    def _attention(self, x: Node, cache: Cache) -> Node:
        """Grouped-query attention (build_qkv, build_attn)."""
        model, inputs = self.model, self.inputs[cache.window]
        kv_heads = cache.k // model.attention.key_length

        def project(heads: int, length: int) -> Node:
            return view(_matmul(x, heads * length), (length, heads, self.rows))

        def rotate(part: Node) -> Node:
            return inplace(part.shape, _norm(part), self.positions)

        q, k, v = (
            project(model.attention.heads, model.attention.key_length),
            project(kv_heads, model.attention.key_length),
            project(kv_heads, model.attention.value_length),
        )
        q, k = rotate(q), rotate(k)
        if "k_turn" in inputs:
            q, k = _turn(q, inputs["k_turn"]), _turn(k, inputs["k_turn"])
        if "v_turn" in inputs:
            v = _turn(v, inputs["v_turn"])
        for part in (q, k, v) if cache.window else (q, v, k):
            self.graph.expand(part)
        self._store(k, inputs["k_ids"])
        self._store(v, inputs["v_ids"])
        mixed = self._attend(q, cache, kv_heads, model.attention.value_length)
        if "v_turn" in inputs:
            mixed = _turn(mixed, inputs["v_turn"])
        return _matmul(mixed, model.hidden_size)

    def _store(self, part: Node, ids: Node) -> None:
        flat = view(part, (part.shape[0] * part.shape[1], part.shape[2]))
        self.graph.expand(Node("view", flat.shape, (OUTSIDE, flat, ids)))

    def _attend(self, q: Node, cache: Cache, kv_heads: int, value_length: int) -> Node:
        """Scores and values (build_attn_mha); F32 caches are copied as F16 for flash attention."""
        settings, streams = self.settings, self.settings.sequences
        cells, mask = window_cells(settings, cache.window), self.inputs[cache.window]["mask"]
        heads, each = self.model.attention.heads, self.rows // streams
        q = view(view(q, (q.shape[0], heads, each, streams), strided=True), (q.shape[0], each, heads, streams), strided=True)
        if settings.flash:
            k = op((cache.k // kv_heads, cells, kv_heads, streams), OUTSIDE, item=2) if settings.kv_k == "F32" else OUTSIDE
            kept_v = settings.kv_k if self.model.attention.latent else settings.kv_v
            v = op((value_length, cells, kv_heads, streams), OUTSIDE, item=2) if kept_v == "F32" else OUTSIDE
            mixed = op((value_length, heads, each, streams), q, k, v, mask)
        else:
            scores = op((cells, each, heads, streams), OUTSIDE, q)
            scores = inplace(scores.shape, scores, mask)
            values = OUTSIDE
            if self.model.attention.latent:  # the latent rows are values too, and must be turned
                values = op((value_length, cells, kv_heads, streams), OUTSIDE, item=KV_FORMATS[settings.kv_k].block_bytes)
            mixed = op((value_length, each, heads, streams), values, scores)
        return self._flatten(mixed, heads)

    def _flatten(self, mixed: Node, heads: int) -> Node:
        """One row per token again; latent attention first expands each head's values."""
        model, flash = self.model, self.settings.flash
        length, streams = mixed.shape[0], self.settings.sequences
        each = self.rows // streams
        if model.attention.latent:
            length = model.attention.value_length
            if flash:
                mixed = view(mixed, (mixed.shape[0], each, heads, streams), strided=True)
            mixed = op((length, each, heads, streams), OUTSIDE, mixed)
        if flash and not model.attention.latent:
            return self.graph.expand(view(mixed, (length * heads, self.rows)))
        turned = view(mixed, (length, heads, each, streams), strided=True)
        if flash:
            return self.graph.expand(view(op(turned.shape, turned), (length * heads, self.rows)))
        return self.graph.expand(op((length * heads, self.rows), turned))

    def _latent_attention(self, x: Node, cache: Cache) -> Node:
        """MLA with absorbed matrices: every head attends to the same latent row (deepseek2.cpp)."""
        model, inputs, heads, rows = self.model, self.inputs[cache.window], self.model.attention.heads, self.rows
        rank, rope = model.attention.latent, cache.k - model.attention.latent
        narrow = _norm(_matmul(x, model.attention.q_latent)) if model.attention.q_latent else x
        q = view(_matmul(narrow, heads * model.attention.key_length), (model.attention.key_length, heads, rows))
        both = _matmul(x, cache.k)
        k_rope = inplace((rope, 1, rows), view(both, (rope, 1, rows), strided=True), self.positions)
        latent = _norm(view(both, (rank, rows), strided=True))
        q_rope = inplace((rope, heads, rows), view(q, (rope, heads, rows), strided=True), self.positions)
        plain = view(
            view(q, (model.attention.key_length - rope, heads, rows), strided=True),
            (model.attention.key_length - rope, rows, heads),
            strided=True,
        )
        absorbed = view(op((rank, rows, heads), OUTSIDE, plain), (rank, heads, rows), strided=True)
        q = op((cache.k, heads, rows), absorbed, q_rope)
        v = view(latent, (rank, 1, rows))
        k = op((cache.k, 1, rows), v, k_rope)
        for part in (q, v, k):
            self.graph.expand(part)
        self._store(k, inputs["k_ids"])
        return _matmul(self._attend(q, cache, 1, rank), model.hidden_size)

    def _experts(self, x: Node) -> Node:
        """Router, the chosen experts, their weighted sum (build_moe_ffn)."""
        model, rows = self.model, x.shape[1]
        k, size = model.top_k, model.expert.size
        logits = _matmul(x, model.n_experts)
        if model.expert.biased:
            logits = inplace(logits.shape, logits, OUTSIDE)
        shares = logits if model.router.scoring == "chosen" else inplace(logits.shape, logits)
        ranked = inplace(shares.shape, shares, OUTSIDE) if model.router.scoring == "sigmoid" else shares  # a bias for the choice alone
        chosen = view(op(ranked.shape, ranked), (k, rows), strided=True)
        gates = self.graph.expand(self._gates(op((1, k, rows), view(shares, (1, model.n_experts, rows)), chosen)))
        one = view(x, (model.hidden_size, 1, rows))

        def multiply(source: Node, width: int) -> Node:
            out = op((width, k, rows), OUTSIDE, source, chosen)
            return inplace(out.shape, out, OUTSIDE, chosen) if model.expert.biased else out

        up, gate = multiply(one, size), multiply(one, size)
        out = multiply(op((size, k, rows), gate, up), model.hidden_size)
        out = self.graph.expand(inplace(out.shape, out, gates))
        parts = [self.graph.expand(view(out, (model.hidden_size, rows), strided=True)) for _ in range(k)]
        total = parts[0] if k > 1 else op(parts[0].shape, parts[0])
        for part in parts[1:]:
            total = self.graph.expand(inplace(total.shape, total, part))
        return total

    def _gates(self, gates: Node) -> Node:
        """Gates of the chosen experts, as the router's rule changes them."""
        model, shape = self.model, gates.shape
        flat = (shape[1], shape[2])
        if model.router.scoring == "chosen":
            gates = view(inplace(flat, view(gates, flat)), shape)
        if model.router.renormalize:
            seen = view(gates, flat)
            total = op((1, shape[2]), seen)
            gates = view(inplace(flat, seen, inplace(total.shape, total)), shape)
        return gates if model.router.scale in (0.0, 1.0) else inplace(shape, gates)

    def _head(self, hidden: Node) -> None:
        last = _norm(hidden)
        last.output = True
        logits = _matmul(last, self.model.vocab_size)
        logits.output = True
        self.graph.expand(logits)
