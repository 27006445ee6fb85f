"""This script writes a random Qwen3-MoE checkpoint whose weights outweigh the process: for memory measurements, not for quality.

    python benchmarks/make_random_checkpoint.py OUT [--layers 10]      # 10 layers: 2.1 GB

Same seed, same bytes.  Tokenizer and vocabulary are those of examples/tiny-moe.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from arguments import make_parser
from safetensors.torch import save_file

TOKENIZER = Path(__file__).parents[1] / "examples" / "tiny-moe"
HIDDEN, EXPERTS, EXPERT_SIZE, HEADS, KV_HEADS, HEAD_DIM, TOP_K, VOCAB = 1024, 32, 1024, 16, 4, 64, 2, 4096


def layer_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer's tensors."""
    attention = {"q": (HEADS * HEAD_DIM, HIDDEN), "k": (KV_HEADS * HEAD_DIM, HIDDEN), "v": (KV_HEADS * HEAD_DIM, HIDDEN)}
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{n}_proj.weight": shape for n, shape in attention.items()}
    shapes |= {"self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM), "mlp.gate.weight": (EXPERTS, HIDDEN)}
    shapes |= {f"self_attn.{n}_norm.weight": (HEAD_DIM,) for n in "qk"}
    shapes |= {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    for e in range(EXPERTS):
        for n in ("gate", "up"):
            shapes[f"mlp.experts.{e}.{n}_proj.weight"] = (EXPERT_SIZE, HIDDEN)
        shapes[f"mlp.experts.{e}.down_proj.weight"] = (HIDDEN, EXPERT_SIZE)
    return shapes


def random_tensor(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Ones for norms, else normal values that keep the size of what they multiply."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(torch.bfloat16)


def write_checkpoint(out: Path, layers: int) -> None:
    """One shard per layer, one for the ends, an index and a config."""
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    ends = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    parts: list[dict[str, tuple[int, ...]]] = [dict(ends)]
    parts += [{f"model.layers.{layer}.{n}": shape for n, shape in layer_shapes().items()} for layer in range(layers)]
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: random_tensor(shape, generator) for name, shape in part.items()}, out / file, {"format": "pt"})
        weight_map |= {name: file for name in part}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": EXPERT_SIZE,
        "intermediate_size": 2 * EXPERT_SIZE,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rope_theta": 10000,
        "rms_norm_eps": 1e-6,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, out / name)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=10)
    arguments = parser.parse_args()
    write_checkpoint(arguments.out, arguments.layers)
