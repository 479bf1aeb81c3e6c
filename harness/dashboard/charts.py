"""The charts, as Vega-Lite specifications with the data left out: pages fill them in.

Drawn once a site with altair; a page then carries numbers only. Colours are blue and orange, which
colour-blind people tell apart, and no meaning hangs on colour alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

_BLUE, _ORANGE = "#0a6ebd", "#c25700"
# Ends of the shades of error over limit, as parts of the limit; they decide nothing.
_ENDS = [0.25, 0.5, 0.75, 1.0, 10.0]
_SHADES = ["#d6e6f5", "#a9cbe8", "#7fb2de", "#5597cd", "#f2a25c", "#b84e00"]
_VERDICTS = ["conforms", "diverges", "not-proven"]


@lru_cache(maxsize=1)
def charts() -> dict[str, Any]:
    """Return every specification by name; each expects its rows under the name ``rows``."""
    import altair

    rows = altair.NamedData("rows")
    made = {
        "heat": _heat(altair, rows, "mode"),
        "compare": _heat(altair, rows, "run"),
        "slopes": _slopes(altair, rows),
        "positions": _positions(altair, rows),
        "trend": _trend(altair, rows),
        "kill": _kill(altair, rows),
        "rivals": _rivals(altair, rows),
    }
    found = {}
    for name, chart in made.items():
        spec = chart.to_dict()
        # The page sets colours for light and dark; the defaults of altair would overrule them.
        spec.pop("config", None)
        found[name] = spec
    return found


def _heat(alt: Any, rows: Any, column: str) -> Any:
    scale = alt.Scale(type="threshold", domain=_ENDS, range=_SHADES)
    legend = alt.Legend(type="symbol", symbolType="square", format="~g")
    base = alt.Chart(rows).encode(
        x=alt.X("tap:N", sort=None, title=None, axis=alt.Axis(labelAngle=-45, labelLimit=160)),
        y=alt.Y("layer:O", title="layer"),
    )
    cells = base.mark_rect(stroke=None).encode(
        color=alt.Color("of_limit:Q", scale=scale, title="of limit", legend=legend),
        tooltip=["tap:N", "layer:O", "of_limit:Q", "statistic:N", "case:N"],
    )
    # Beyond the limit is a sign, too, not a colour only.
    marks = (
        base.transform_filter("datum.verdict == 'diverges'")
        .mark_point(shape="triangle-up", size=60, filled=True, color="#101010")
        .encode()
    )
    return (
        alt.layer(cells, marks)
        .properties(width=alt.Step(30), height=alt.Step(24))
        .facet(column=alt.Column(f"{column}:N", title=None, sort=None))
    )


def _slopes(alt: Any, rows: Any) -> Any:
    kinds = alt.Scale(domain=["expected", "measured"], range=["#666666", _ORANGE])
    shapes = alt.Scale(domain=["expected", "measured"], range=["circle", "cross"])
    return (
        alt.Chart(rows)
        .transform_fold(["expected", "measured"], as_=["kind", "slope"])
        .mark_point(size=70, filled=True, opacity=0.8)
        .encode(
            x=alt.X("head:O", title="head", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("slope:Q", scale=alt.Scale(type="log"), title="slope per key, log scale"),
            color=alt.Color("kind:N", scale=kinds, title=None),
            shape=alt.Shape("kind:N", scale=shapes, title=None),
            tooltip=["head:O", "expected:Q", "measured:Q"],
        )
        .properties(width="container", height=220)
    )


def _positions(alt: Any, rows: Any) -> Any:
    return (
        alt.Chart(rows)
        .mark_line(point=alt.OverlayMarkDef(size=18))
        .encode(
            x=alt.X("position:Q", title="position", axis=alt.Axis(tickMinStep=1, format="d")),
            y=alt.Y(
                "kl:Q",
                # Zero has a place beside what is a billionth of a nat.
                scale=alt.Scale(type="symlog", constant=1e-9),
                title="KL, nats",
                axis=alt.Axis(format=".0e"),
            ),
            color=alt.Color("case:N", scale=alt.Scale(scheme="tableau10"), title=None),
            strokeDash=alt.StrokeDash("case:N", title=None),
            tooltip=["case:N", "position:Q", "kl:Q"],
        )
        .properties(width="container", height=240)
    )


def _trend(alt: Any, rows: Any) -> Any:
    x = alt.X("at:Q", title="run, oldest first", axis=alt.Axis(tickMinStep=1))
    base = alt.Chart(rows).encode(x=x)
    colours = alt.Scale(domain=_VERDICTS, range=[_BLUE, _ORANGE, "#8a7400"])
    shapes = alt.Scale(domain=_VERDICTS, range=["circle", "triangle-up", "square"])
    line = base.mark_line(color=_BLUE, strokeWidth=1).encode(y=alt.Y("value:Q", title="value"))
    baseline = base.mark_line(color="#808080", strokeDash=[5, 4], interpolate="step").encode(
        y="baseline:Q"
    )
    points = base.mark_point(filled=True, size=50).encode(
        y="value:Q",
        color=alt.Color("verdict:N", scale=colours, title="verdict"),
        shape=alt.Shape("verdict:N", scale=shapes, title="verdict"),
        tooltip=["run:N", "commit:N", "verdict:N", "value:Q", "baseline:Q", "mark:N"],
    )
    # Runs without a mark keep an invisible rule: a layer of none has no scale to draw on.
    shown = alt.condition("datum.mark != ''", alt.value(1), alt.value(0))
    anchors = base.mark_rule(strokeWidth=2, strokeDash=[2, 2]).encode(
        color=alt.value("#808080"), opacity=shown, tooltip=["run:N", "mark:N"]
    )
    words = base.mark_text(align="left", dx=4, dy=4, baseline="top").encode(
        text="mark:N", y=alt.value(0), color=alt.value("#808080")
    )
    return alt.layer(anchors, baseline, line, points, words).properties(
        width="container", height=300
    )


def _kill(alt: Any, rows: Any) -> Any:
    return (
        alt.Chart(rows)
        .mark_bar(color=_BLUE)
        .encode(
            x=alt.X("percent:Q", title="caught, %", scale=alt.Scale(domain=[0, 100])),
            y=alt.Y("area:N", sort=None, title=None),
            tooltip=["area:N", "caught:Q", "of:Q", "percent:Q"],
        )
        .properties(width="container", height=alt.Step(22))
    )


def _rivals(alt: Any, rows: Any) -> Any:
    kinds = ["faults caught", "healthy flagged"]
    colours = alt.Scale(domain=kinds, range=[_BLUE, _ORANGE])
    return (
        alt.Chart(rows)
        .mark_bar()
        .encode(
            x=alt.X("percent:Q", title="%", scale=alt.Scale(domain=[0, 100])),
            y=alt.Y("rule:N", sort=None, title=None, axis=alt.Axis(labelLimit=260)),
            yOffset=alt.YOffset("kind:N", sort=kinds),
            color=alt.Color("kind:N", scale=colours, title=None, sort=kinds),
            tooltip=["rule:N", "kind:N", "count:Q", "of:Q", "percent:Q"],
        )
        .properties(width="container", height=alt.Step(14))
    )
