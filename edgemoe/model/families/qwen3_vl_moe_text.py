"""Qwen3-VL-MoE's language model: shaped as Qwen3-MoE."""

from __future__ import annotations

from dataclasses import replace

from edgemoe.model.families import qwen3_moe

FAMILY = replace(qwen3_moe.FAMILY, model_types=("qwen3_vl_moe_text",), refuse=None)
