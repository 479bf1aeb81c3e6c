"""The script that repeats a small failure with nothing but the package installed."""

from __future__ import annotations

import pprint
from dataclasses import asdict

from harness.report.record import Report
from harness.shrink.trial import SEED, Signature, Trial

_TEMPLATE = '''"""{headline}

First divergence: {place}. Exit code 0: it still fails like that; 1: it does not.
"""

import tempfile
from pathlib import Path

import numpy as np

from cases.synthetic import ScaleProfile, make_checkpoint
from harness.pipeline import Request, check

CONFIG = {config}
PROFILE = {profile}
IDS = {ids}

with tempfile.TemporaryDirectory() as folder:
    checkpoint, prompts = Path(folder) / "checkpoint", Path(folder) / "ids.npy"
    profile = ScaleProfile(**PROFILE)
    make_checkpoint(checkpoint, CONFIG, seed={seed}, dtype="bfloat16", scale_profile=profile)
    np.save(prompts, np.array(IDS))
    report = check(
        Request(
            checkpoint=checkpoint,
            prompts=str(prompts),
            subject={subject!r},
            fault={fault!r},
            dtype={dtype!r},
            target={target!r},
            diagnose=False,
        )
    )

first = report.first_divergence
print(report.verdict)
if first is not None:
    print(f"{{first.tap}} ({{first.mode}}): {{first.reason or first.statistic}}")
    print(f"observed {{first.observed}}, limit {{first.limit}}")
same = report.verdict == "diverges" and {condition}
raise SystemExit(0 if same else 1)
'''


def script(trial: Trial, signature: Signature, report: Report) -> str:
    """Return the source of ``repro.py``.

    Parameters
    ----------
    trial
        The small failing check.
    signature
        What it is recognised by.
    report
        What the gate said of it.
    """
    first = report.first_divergence
    fields = asdict(trial)
    condition = "first is None"
    if first is not None:
        condition = f"first is not None and first.tap.endswith({signature.tap!r})"
        condition += f" and first.mode == {signature.mode!r}"
    planted = f" with fault {trial.fault}" if trial.fault else ""
    return _TEMPLATE.format(
        headline=f"{trial.subject} diverges from MPT in {trial.dtype}{planted}.",
        place=f"{first.tap}, {first.mode}" if first is not None else "a tensor does not arrive",
        config=pprint.pformat(fields["config"], width=96),
        profile=pprint.pformat(fields["profile"], width=96),
        ids=pprint.pformat([list(row) for row in trial.ids], width=96, compact=True),
        seed=SEED,
        subject=trial.subject,
        fault=trial.fault,
        dtype=trial.dtype,
        target=trial.target,
        condition=condition,
    )
