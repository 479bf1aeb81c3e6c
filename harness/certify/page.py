"""A certificate as one self-contained page: no network, no script."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from harness.certify.certificate import Certificate, Share
from harness.certify.lines import share


def page(certificate: Certificate) -> str:
    """Return a certificate as HTML; every text from outside is escaped."""
    healthy = certificate.healthy
    ours = Share(healthy.flagged, healthy.runs) if healthy else None
    template = _environment().get_template("certificate.html.jinja")
    return str(template.render(c=certificate, ours=ours))


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("harness.certify", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["share"] = share
    environment.filters["ratio"] = lambda value: "–" if value is None else f"{value:.3g}"
    return environment
