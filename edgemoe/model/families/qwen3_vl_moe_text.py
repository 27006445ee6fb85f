"""Qwen3-VL-MoE's language model has the shapes of Qwen3-MoE; it is known by shape."""

from __future__ import annotations

from dataclasses import replace

from edgemoe.model.families import qwen3_moe

FAMILY = replace(qwen3_moe.FAMILY, model_types=("qwen3_vl_moe_text",), refuse=None)
