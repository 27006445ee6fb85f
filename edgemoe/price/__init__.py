"""Model, Stats and target -> Costs: nats and bytes of every choice, so that dropping and quantizing stand on one scale."""

from edgemoe.base.lazy import offer

_OFFERED = {
    "discount_drops": "choices",
    "price_choices": "choices",
    "price_generic": "priors",
    "price_imported": "imported",
    "score_experts": "saliency",
}
__all__ = list(_OFFERED)
__getattr__ = offer(__name__, _OFFERED)
