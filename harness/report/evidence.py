"""What is known of the gate itself, beside each of its verdicts."""

from __future__ import annotations

from dataclasses import replace

from harness.report.record import EvidenceRecord, Report


def evidence(target: str) -> EvidenceRecord | None:
    """Return the figures of the certificate that came with the package for a target.

    Parameters
    ----------
    target
        As ``check`` has it; a target as JSON has no certificate of its own.

    Returns
    -------
    EvidenceRecord or None
        ``None`` where there is no certificate.
    """
    import msgspec

    from harness.certify.campaign import factors_digest
    from harness.certify.certificate import committed, read_certificate

    try:
        found = read_certificate(committed(target).read_bytes())
    except (OSError, msgspec.MsgspecError):
        return None
    healthy = found.healthy
    return EvidenceRecord(
        certificate=found.digest,
        target=found.target,
        dtype=found.dtype,
        current=found.factors == factors_digest(),
        planted=found.total.full.of,
        caught=found.total.full.count,
        healthy=healthy.inputs if healthy else 0,
        flagged=healthy.flagged if healthy else 0,
        at_most=healthy.upper_bound if healthy else None,
    )


def with_evidence(report: Report) -> Report:
    """Return a report with what is known of the gate that made it."""
    return replace(report, evidence=evidence(report.subject.target))


def evidence_line(report: Report) -> str:
    """Return it in one sentence."""
    known = report.evidence
    if known is None:
        return (
            f"no certificate for {report.subject.target}: how many faults this gate catches there "
            "has not been measured"
        )
    left_out = any(axis.skipped for axis in report.compared.values())
    text = (
        f"this gate catches {known.caught} of {known.planted} planted faults"
        f"{', where nothing is left out' if left_out else ''} ({known.target}, {known.dtype})"
    )
    if known.at_most is not None:
        text += (
            f" and flagged {known.flagged} of {known.healthy} healthy inputs (fewer than "
            f"{100 * known.at_most:.2g} % of checkpoints, 95 % confidence)"
        )
    text += f"; certificate {known.certificate[:12]}"
    return text if known.current else text + ", of other factors than these"
