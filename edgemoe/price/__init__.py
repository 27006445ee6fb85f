"""This package turns Model, Stats and target into Costs: nats and bytes of every choice, with dropping and quantizing on one scale."""

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
