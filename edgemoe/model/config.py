"""This module checks the fields of a config.json when they are read, and names a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemoe.base.errors import ModelError

# LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS of llama.cpp 0c1e570 (src/llama-hparams.h)
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
LARGEST = {"num_hidden_layers": 512} | dict.fromkeys(EXPERT_FIELDS, 1024)
ANY = 2**24  # no count in a config is larger


class Config:
    """The fields of a config.json; `where` is the file that errors name."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values, self.where = values, where

    def __getitem__(self, name: str) -> int:
        """A positive integer.

        Raises:
            ModelError: it is missing, or no such number.
        """
        value, most = self.values.get(name), LARGEST.get(name, ANY)
        if value is None:
            raise ModelError(f"{self.where}: {name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise ModelError(f"{self.where}: {name} is {value!r}, expected a positive integer of at most {most}")
        return value

    def first(self, *names: str) -> int:
        """The first of these fields that is set, which must be a positive integer.

        Raises:
            ModelError: none is set, or it is no such number.
        """
        for name in names:
            if self.values.get(name) is not None:
                return self[name]
        raise ModelError(f"{self.where}: {' / '.join(names)} is missing")

    def get(self, name: str, default: Any = None) -> Any:
        """Any field, unchecked; the default if the field is missing or null."""
        value = self.values.get(name)
        return default if value is None else value

    def nth(self, name: str, n: int, default: Any) -> Any:
        """Entry n of a list field; the default where there is none."""
        values = self.values.get(name)
        return values[n] if isinstance(values, list) and n < len(values) else default

    @property
    def experts(self) -> int:
        """Routed experts of a layer."""
        return self.first(*EXPERT_FIELDS)

    @property
    def top_k(self) -> int:
        """Experts that the router picks."""
        return self.first("num_experts_per_tok", "moe_k")

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self["num_attention_heads"]

    @property
    def head_size(self) -> int:
        """Numbers of one head."""
        return self["hidden_size"] // self.heads if self.values.get("head_dim") is None else self["head_dim"]
