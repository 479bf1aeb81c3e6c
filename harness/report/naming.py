"""A diagnosis in words."""

from __future__ import annotations

from collections.abc import Iterator

from harness.report.record import DiagnosisRecord


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def diagnosis_lines(found: DiagnosisRecord) -> Iterator[str]:
    """Yield what the divergence looks like, the name first."""
    at = f" in layer {found.layer}" if found.layer is not None else ""
    if len(found.layers) > 1:
        at = f" in layers {', '.join(map(str, found.layers))}"
    if found.fault is not None:
        yield (
            f"looks like {found.fault}{at}: coefficient {_number(found.coefficient)} "
            f"± {_number(found.uncertainty)}, explains {_percent(found.explained)} of the error "
            f"at {found.tap} ({found.tried} templates)"
        )
        if found.alike:
            yield f"cannot be told from here: {', '.join(found.alike)}"
        return
    yield f"looks like none of the library's faults: {found.reason} ({found.tap})"
    if found.nearest is not None:
        yield (
            f"nearest is {found.nearest}: coefficient {_number(found.coefficient)}, explains "
            f"{_percent(found.explained)} of the error"
        )


def _percent(share: float | None) -> str:
    if share is None:
        return "an unknown part"
    # Rounded down: what is left unexplained is the point.
    return f"{int(share * 1000) / 10:.1f} %"
