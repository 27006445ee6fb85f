"""This package shows a Plan or Report to people: as lines of the terminal, as a page with pictures, and as a model card."""

from edgemoe.base.lazy import offer

_OFFERED = {
    "render_card": "model_card",
    "render_html": "page",
    "summarize_plan": "terminal",
    "summarize_report": "terminal",
    "write_report": "page",
}
__all__ = list(_OFFERED)
__getattr__ = offer(__name__, _OFFERED)
