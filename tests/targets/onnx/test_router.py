"""Routers as ONNX nodes: transformers' own choice, whatever groups and biases they have."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from edgemoe.base.errors import ModelError
from edgemoe.base.types import F32
from edgemoe.targets.onnx.graph_builder import Sheet, make_model
from edgemoe.targets.onnx.router import Router, add_router


def run_router(
    weight: NDArray[np.float32], bias: NDArray[np.float32] | None, router: Router, x: NDArray[np.float32]
) -> NDArray[np.float32]:
    import onnxruntime

    sheet = Sheet()
    add_router(sheet, "x", "w", len(weight), router, "r", "b" if bias is not None else "")
    feeds = {"x": x, "w": np.ascontiguousarray(weight.T)} | ({"b": bias} if bias is not None else {})
    inputs = [onnx.helper.make_tensor_value_info(k, 1, v.shape) for k, v in feeds.items()]
    model = make_model(sheet, inputs, [onnx.helper.make_tensor_value_info("r.gates", 1, None)], {})
    gates: F32 = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]
    return gates


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_routers_with_groups_and_a_correction_bias_are_transformers_own(family: str, groups: tuple[int, int], renormalize: bool) -> None:
    from transformers import DeepseekV3Config, Glm4MoeConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

    config, router = {"deepseek_v3": (DeepseekV3Config, DeepseekV3TopkRouter), "glm4_moe": (Glm4MoeConfig, Glm4MoeTopkRouter)}[family]
    shape: dict[str, Any] = {"n_routed_experts": 16, "num_experts_per_tok": 3, "hidden_size": 64, "norm_topk_prob": renormalize}
    module: Any = router(config(**shape, n_group=groups[0], topk_group=groups[1], routed_scaling_factor=2.5))
    generator = torch.Generator().manual_seed(1)
    module.weight.data = torch.randn(16, 64, generator=generator) / 8
    module.e_score_correction_bias = torch.randn(16, generator=generator) / 4
    x = torch.randn(200, 64, generator=generator)
    with torch.no_grad():
        _, weights, index = module(x)
        want = torch.zeros(200, 16).scatter_(1, index, weights).numpy()
    rule = Router(top_k=3, scoring="sigmoid", renormalize=renormalize, scale=2.5, groups=groups[0], top_groups=groups[1])
    got = run_router(module.weight.detach().numpy(), module.e_score_correction_bias.numpy(), rule, x.numpy())
    assert np.abs(got - want).max() < 1e-6


GROUPED = np.array([0.9, 0.1, 0.5, 0.45, 0.3, 0.6, 0.2, 0.7])  # scores of one token, in four groups of two


@pytest.mark.parametrize(
    ("left", "groups", "chosen"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 4, [0, 2]),  # group sums 1.0, 0.95, 0.9, 0.9: the first two
        ([0, 2, 3, 5, 6, 7], 3, [0, 5]),  # 1 and 4 gone, numbered anew: 0 and 2 are still there, and 2 is not chosen any more
    ],
)
def test_numbering_experts_anew_across_groups_changes_the_choice_of_a_token_that_lost_none(
    left: list[int], groups: int, chosen: list[int]
) -> None:
    scores = GROUPED[left]
    logits = np.log(scores / (1 - scores)).astype(np.float32)[:, None]
    rule = Router(top_k=2, scoring="sigmoid", groups=groups, top_groups=2)
    gates = run_router(logits, None, rule, np.ones((1, 1), np.float32))[0]
    assert [left[i] for i in np.flatnonzero(gates)] == chosen


@pytest.mark.parametrize(("n", "groups", "top_groups"), [(6, 4, 2), (7, 4, 2), (4, 4, 1)])
def test_experts_that_are_not_as_many_of_each_group_are_refused(n: int, groups: int, top_groups: int) -> None:
    with pytest.raises(ModelError, match="groups"):
        add_router(Sheet(), "x", "w", n, Router(top_k=2, groups=groups, top_groups=top_groups), "r")


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_softmax_routers_run_over_the_rows_that_are_left(n: int, renormalize: bool) -> None:
    generator = np.random.default_rng(n)
    weight, x = generator.standard_normal((n, 32)).astype(np.float32), generator.standard_normal((50, 32)).astype(np.float32)
    logits = (x @ weight.T).astype(np.float64)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    chosen = np.argsort(-p, axis=1)[:, :3]
    want = np.zeros_like(p)
    np.put_along_axis(want, chosen, np.take_along_axis(p, chosen, 1), 1)
    if renormalize:
        want /= want.sum(axis=1, keepdims=True)
    assert np.abs(run_router(weight, None, Router(top_k=3, renormalize=renormalize), x) - want).max() < 1e-6
