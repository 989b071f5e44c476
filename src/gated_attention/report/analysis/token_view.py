"""A text whose tokens are shaded by their gate scores, layer by layer."""

import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from gated_attention.report.blocks import WidgetBlock, render


def token_view(title: str, tokens: Sequence[str], scores: Float[np.ndarray, "layers tokens"]) -> WidgetBlock:
    """The widget for one model's gates of one site.

    The mean over layers is shown first, and all there is without a script; a slider picks one layer. The shade goes
    from the smallest to the largest score of any layer.

    Args:
        title: Above the text.
        tokens: The text, token by token.
        scores: Averaged over channels and heads; NaN for a layer without the gate.
    """
    layers = np.flatnonzero(np.isfinite(scores).all(1))
    rows = np.vstack([scores[layers].mean(0), scores[layers]])
    low, high = float(min(0.0, rows.min())), float(rows.max())
    high = high if high > low else low + 1.0
    data = {
        "low": round(low, 3),
        "high": round(high, 3),
        "names": ["all layers", *(f"layer {layer}" for layer in layers)],
        "rows": [[round(float(score), 3) for score in row] for row in rows],
    }
    shares = (rows[0] - low) / (high - low)
    spans = [
        {"token": _visible(token), "share": f"{share:.2f}", "score": f"{score:.3f}"}
        for token, share, score in zip(tokens, shares, rows[0], strict=True)
    ]
    markup = render("token_view.html", title=title, data=data, low=f"{low:.2f}", high=f"{high:.2f}", spans=spans)
    order = np.argsort(rows[0])
    ends = [f"`{_word(tokens[i])}` {rows[0][i]:.2f}" for i in (*order[:3], *order[-3:])]
    words = f"{title}: lowest {', '.join(ends[:3])}; highest {', '.join(ends[3:])}."
    return WidgetBlock(markup, "token_view.css", "token_view.js", words)


def _visible(token: str) -> str:
    """A token as the view shows it: line ends keep their effect and get a sign, so that they can be shaded."""
    return token.replace("\r", "").replace("\n", "⏎\n") or "∅"


def _word(token: str) -> str:
    return json.dumps(token, ensure_ascii=False)[1:-1].replace("`", "'") or "∅"
