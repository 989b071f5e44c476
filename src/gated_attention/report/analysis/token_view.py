"""A text whose tokens are shaded by their gate scores, layer by layer."""

import json
from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import Float

from gated_attention.report.blocks import WidgetBlock

_STYLE = """\
.gates { margin: 1.5rem 0 2.5rem; }
.gates h3 { margin-bottom: 0.4rem; }
.gates .bar { display: flex; flex-wrap: wrap; align-items: center; gap: 0.4rem 1rem; margin-bottom: 0.6rem;
  color: var(--soft); font-size: 0.9rem; }
.gates .bar label { display: flex; align-items: center; gap: 0.6rem; flex: 1 1 16rem; max-width: 26rem; }
.gates input { flex: 1; min-width: 7rem; accent-color: var(--link); }
.gates output { min-width: 5.5rem; color: var(--ink); font-variant-numeric: tabular-nums; }
.gates .scale { display: flex; align-items: center; gap: 0.4rem; }
.gates .scale i { width: 5rem; height: 0.8em; border-radius: 3px; border: 1px solid var(--line);
  background: linear-gradient(to right, transparent, rgb(230 120 30 / 0.75)); }
.gates .text { border: 1px solid var(--line); border-radius: 8px; padding: 0.8rem 1rem; line-height: 1.9;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 0.88rem/1.9 ui-monospace, SFMono-Regular, Menlo, Consolas,
  monospace; }
.gates .text span { background: rgb(230 120 30 / calc(var(--g) * 0.75)); border-radius: 2px; }
.gates .text span:hover { outline: 1px solid var(--ink); }
"""

_SCRIPT = """\
for (const view of document.querySelectorAll(".gates")) {
  const data = JSON.parse(view.querySelector("script").textContent);
  const tokens = view.querySelectorAll(".text span"), slider = view.querySelector("input");
  const shown = view.querySelector("output");
  view.querySelector("label").hidden = false;
  const draw = () => {
    const row = data.rows[slider.value];
    shown.textContent = data.names[slider.value];
    tokens.forEach((token, i) => {
      token.style.setProperty("--g", Math.min(1, Math.max(0, (row[i] - data.low) / (data.high - data.low))));
      token.title = row[i].toFixed(3);
    });
  };
  slider.addEventListener("input", draw);
  draw();
}
"""


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
    spans = "".join(
        f'<span style="--g:{share:.2f}" title="{score:.3f}">{escape(_visible(token))}</span>'
        for token, share, score in zip(tokens, shares, rows[0], strict=True)
    )
    markup = (
        f'<section class="gates">\n<h3>{escape(title)}</h3>\n<div class="bar">'
        f'<label hidden>Layer <input type="range" min="0" max="{len(layers)}" value="0" '
        f'aria-label="Layer, 0 for all"><output>all layers</output></label>'
        f'<span class="scale">{low:.2f} <i></i> {high:.2f}</span></div>\n<div class="text">{spans}</div>\n'
        f'<script type="application/json">{json.dumps(data, separators=(",", ":"))}</script>\n</section>'
    )
    order = np.argsort(rows[0])
    ends = [f"`{_word(tokens[i])}` {rows[0][i]:.2f}" for i in (*order[:3], *order[-3:])]
    return WidgetBlock(
        markup, _STYLE, _SCRIPT, f"{title}: lowest {', '.join(ends[:3])}; highest {', '.join(ends[3:])}."
    )


def _visible(token: str) -> str:
    """A token as the view shows it: line ends keep their effect and get a sign, so that they can be shaded."""
    return token.replace("\r", "").replace("\n", "⏎\n") or "∅"


def _word(token: str) -> str:
    return json.dumps(token, ensure_ascii=False)[1:-1].replace("`", "'") or "∅"
