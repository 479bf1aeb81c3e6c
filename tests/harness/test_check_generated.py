"""The port on configs that nobody chose: what once failed first, then whatever Hypothesis makes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from cases.regressions import Regression, load_regressions
from cases.strategies import Case, checkpoint_cases, configs
from harness.pipeline import Request, check
from harness.report.record import Report


def assert_complete(axes: Any) -> None:
    for name, axis in axes.items():
        assert axis["compared"] == axis["expected"] > 0, name
        assert not axis["skipped"], name


KEPT = load_regressions()


# With heads of a single channel a norm is zero whatever comes in, and one value is every head's.
GENERATED = checkpoint_cases(
    configs(max_layers=2, max_width=48, max_seq_len=24).filter(
        lambda raw: raw["d_model"] > raw["n_heads"]
    )
)


def judge(case: Case, dtype: str, directory: Path, **options: Any) -> Report:
    checkpoint = case.write(directory / "checkpoint", "bfloat16")
    prompts = directory / "ids.npy"
    np.save(prompts, np.array(case.ids))
    return check(Request(checkpoint, dtype=dtype, prompts=str(prompts), **options))


def assert_conforms(report: Report) -> None:
    wrong = [tap for tap in report.taps if tap.verdict != "conforms"]
    assert report.verdict == "conforms", (report.reason, report.failures, wrong)
    assert_complete(msgspec.to_builtins(report.compared))


# The golden itself is one constant there: no subject can be told from a constant.
ONE_CHANNEL = {"norm_1", "norm_2", "attn.context", "attn.out_proj", "ffn.down_proj"}
VACUOUS = {
    "logit-scale-zero": {"logits"},
    "one-head-one-channel": {"norm_1", "norm_2"},
    "one-channel": ONE_CHANNEL | {"transformer.norm_f"},
}
TELLING = [kept for kept in KEPT if kept.name not in VACUOUS]


@pytest.mark.parametrize("kept", TELLING, ids=lambda kept: kept.name)
def test_what_was_kept_conforms(kept: Regression, tmp_path: Path) -> None:
    assert_conforms(judge(kept.case, "float16", tmp_path))


@pytest.mark.parametrize("kept", TELLING, ids=lambda kept: kept.name)
def test_what_was_kept_conforms_in_the_oracle_too(kept: Regression, tmp_path: Path) -> None:
    """Two implementations on the same case: a limit that is wrong hits both."""
    assert_conforms(judge(kept.case, "bfloat16", tmp_path, subject="torch"))


@pytest.mark.parametrize("name", VACUOUS)
def test_a_constant_golden_proves_nothing(name: str, tmp_path: Path) -> None:
    (kept,) = (kept for kept in KEPT if kept.name == name)
    report = judge(kept.case, "float16", tmp_path)
    assert report.verdict == "not-proven"
    assert "taps" in report.reason
    assert not [tap for tap in report.taps if tap.verdict != "conforms"]


@settings(
    derandomize=True,
    database=None,
    max_examples=8,
    # Every example is a compilation; what fails is shrunk by hand into cases/regressions.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(case=GENERATED)
def test_the_port_conforms_on_any_config(case: Case) -> None:
    with tempfile.TemporaryDirectory() as directory:
        assert_conforms(judge(case, "float16", Path(directory)))


@settings(
    derandomize=True,
    database=None,
    max_examples=25,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(case=GENERATED)
def test_the_oracle_in_the_originals_order_conforms_on_any_config(case: Case) -> None:
    with tempfile.TemporaryDirectory() as directory:
        assert_conforms(judge(case, "bfloat16", Path(directory), subject="torch"))
