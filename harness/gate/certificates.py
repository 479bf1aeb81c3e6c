"""What the gate asks of a certificate: the figures of the gate itself."""

from __future__ import annotations

from pathlib import Path

import msgspec

from harness.certify.certificate import read_certificate
from harness.gate.findings import Finding
from harness.gate.policy import Figures
from harness.ledger.identity import factors as factors_digest


def certificate_finding(place: Path, figures: Figures) -> Finding:
    """Return whether a certificate is there, whole, of these factors, and good enough."""
    check = "certificate"
    try:
        found = read_certificate(place.read_bytes())
    except OSError as error:
        return Finding(check, "not-proven", f"not proven: {place.name}: {error.strerror}")
    except msgspec.MsgspecError as error:
        return Finding(check, "fail", f"{place.name} is no certificate: {error}")
    short = found.digest[:12]
    if found.sample:
        return Finding(check, "not-proven", f"not proven: certificate {short} is of a sample only")
    if figures.same_factors and found.factors != factors_digest():
        text = f"not proven: certificate {short} was made with other factors ({found.factors[:12]})"
        return Finding(check, "not-proven", text)
    rate = found.total.full
    if rate.percent < figures.kill_percent:
        text = f"certificate {short}: {rate.count} of {rate.of} faults caught"
        return Finding(check, "fail", f"{text}, {figures.kill_percent:g} % required")
    if figures.false_alarm_percent is not None:
        if found.healthy is None:
            return Finding(
                check, "not-proven", f"not proven: certificate {short} ran no healthy subject"
            )
        bound = 100 * found.healthy.upper_bound
        if bound > figures.false_alarm_percent:
            text = f"certificate {short}: false alarms are only known to be below {bound:.2g} %"
            return Finding(check, "fail", f"{text}, {figures.false_alarm_percent:g} % required")
    return Finding(check, "pass", f"certificate {short}: {rate.count} of {rate.of} faults caught")
