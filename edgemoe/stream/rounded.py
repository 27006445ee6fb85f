"""This module rounds weights of a loaded layer in place for a while."""

from __future__ import annotations

import torch

from edgemoe.quantize.reference import round_to_nearest


class rounded_weights:
    """Round a weight in place, and put it back; experts are rounded one at a time, so that memory holds one copy of one tensor."""

    def __init__(self, view: torch.Tensor, bits: int) -> None:
        self.view, self.bits = view, bits

    def __enter__(self) -> None:
        self.before = self.view.to(torch.bfloat16) if _is_bf16(self.view) else self.view.clone()
        for part in self.view if self.view.dim() == 3 else (self.view,):
            part.copy_(torch.from_numpy(round_to_nearest(part.cpu().numpy(), self.bits)))

    def __exit__(self, *_: object) -> None:
        self.view.copy_(self.before)
        del self.before


def _is_bf16(view: torch.Tensor) -> bool:
    """Whether every weight is exact in bfloat16, as in nearly every checkpoint; the copy to put back is then half as large."""
    return all(torch.equal(p, p.to(torch.bfloat16).float()) for p in (view if view.dim() == 3 else (view,)))
