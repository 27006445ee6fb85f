"""This module writes a trained TinyMoE (train_tiny_moe.py) as a Hugging Face checkpoint."""

import json

import torch
from safetensors.torch import save_file

EOS = "<|endoftext|>"


def named_weights(model):
    """The model's weights by the names of the family's checkpoints."""
    c = model.c
    mixtral = c.family == "mixtral"
    out = {"model.embed_tokens.weight": model.embed_tokens.weight, "model.norm.weight": model.norm.weight}
    if not c.tied:
        out["lm_head.weight"] = model.lm_head.weight
    for i, layer in enumerate(model.layers):
        pre = f"model.layers.{i}."
        for name, p in layer.named_parameters():
            if not name.startswith("mlp."):
                out[pre + name] = p
        moe = pre + ("block_sparse_moe." if mixtral else "mlp.")
        out[moe + "gate.weight"] = layer.mlp.gate.weight
        for e in range(c.experts):
            gate, up = layer.mlp.gate_up[e].chunk(2, 0)
            names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
            for name, p in zip(names, (gate, up, layer.mlp.down[e])):
                out[f"{moe}experts.{e}.{name}.weight"] = p
    return {k: v.detach().to("cpu", torch.bfloat16).clone() for k, v in out.items()}


def make_config(c, eos):
    """The config.json of the family."""
    config = dict(
        model_type=c.family,
        hidden_size=c.hidden,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        vocab_size=c.vocab,
        max_position_embeddings=c.long_seq,
        rope_theta=c.rope_theta,
        rms_norm_eps=1e-6,
        hidden_act="silu",
        tie_word_embeddings=c.tied,
        torch_dtype="bfloat16",
        bos_token_id=eos,
        eos_token_id=eos,
        initializer_range=0.02,
        use_cache=True,
        attention_dropout=0.0,
        num_experts_per_tok=c.top_k,
        router_aux_loss_coef=c.aux,
        output_router_logits=False,
    )
    if c.family == "mixtral":
        config |= dict(architectures=["MixtralForCausalLM"], num_local_experts=c.experts, intermediate_size=c.inner, sliding_window=None)
    else:
        config |= dict(
            architectures=["Qwen3MoeForCausalLM"],
            num_experts=c.experts,
            moe_intermediate_size=c.inner,
            norm_topk_prob=True,
            intermediate_size=c.inner * c.top_k,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            attention_bias=False,
            rope_scaling=None,
            use_sliding_window=False,
            sliding_window=None,
        )
    return config


def save(model, tok, folder):
    c, eos = model.c, tok.token_to_id(EOS)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named_weights(model), folder / "model.safetensors", {"format": "pt"})
    dump = lambda name, obj: (folder / name).write_text(json.dumps(obj, indent=2, sort_keys=True) + "\n")
    dump("config.json", make_config(c, eos))
    dump("generation_config.json", dict(bos_token_id=eos, eos_token_id=eos, do_sample=True, temperature=0.8, top_k=40))
    dump(
        "tokenizer_config.json",
        dict(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token=None,
            eos_token=EOS,
            pad_token=EOS,
            unk_token=None,
            model_max_length=c.long_seq,
            clean_up_tokenization_spaces=False,
        ),
    )
    tok.save(str(folder / "tokenizer.json"))
