"""This package runs a model as a stream: texts become windows of tokens, whose hidden states pass through one layer at a time."""

from edgemoe.base.lazy import offer

_OFFERED = {
    "LayerStream": "layers",
    "choose_texts": "texts",
    "collect_gradients": "gradients",
    "final_states": "passes",
    "tokenize": "windows",
}
__all__ = list(_OFFERED)
__getattr__ = offer(__name__, _OFFERED)
