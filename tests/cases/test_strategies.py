"""The strategies draw every feature, and nothing that is invalid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, find, given, settings

from cases.regressions import Regression, RegressionError, load_regressions, save_regression
from cases.strategies import FEATURES, Case, Ids, checkpoint_cases, configs, token_ids
from cases.topology import tensor_shapes
from harness.checkpoint import Checkpoint
from reference.config import MPTConfig

EXAMPLES = settings(
    max_examples=250, derandomize=True, database=None, phases=[Phase.generate], deadline=None
)


SHRINKING = settings(derandomize=True, database=None, deadline=None)


def test_every_feature_is_drawn() -> None:
    counts = dict.fromkeys(FEATURES, 0)
    heads: set[int] = set()

    @EXAMPLES
    @given(configs())
    def draw(raw: dict[str, Any]) -> None:
        heads.add(raw["n_heads"])
        for name, has in FEATURES.items():
            counts[name] += bool(has(raw))

    draw()
    assert not [name for name, count in counts.items() if count == 0], counts
    assert {1, 3, 5, 7, 12, 40} <= heads


@EXAMPLES
@given(configs())
def test_configs_are_valid(raw: dict[str, Any]) -> None:
    config = MPTConfig.from_dict(raw)
    assert config.unknown == ()
    assert 1 <= config.n_heads <= 40
    assert config.d_model <= 96
    assert tensor_shapes(raw)["transformer.wte.weight"] == (config.vocab_size, config.d_model)


def test_configs_shrink_to_the_plain_model() -> None:
    smallest = find(configs(), lambda raw: True, settings=SHRINKING)
    plain = {"one head", "multi-head", "alibi"}
    drawn = {name for name, has in FEATURES.items() if has(smallest)}
    assert drawn - {"odd width", "low_precision_layernorm", "partial attn_config"} == plain


@EXAMPLES
@given(checkpoint_cases())
def test_ids_fit_the_config(case: Case) -> None:
    assert 1 <= len(case.ids) <= 3
    assert {len(row) for row in case.ids} == {len(case.ids[0])}
    assert 1 <= len(case.ids[0]) <= case.config["max_seq_len"]
    assert all(0 <= value < case.config["vocab_size"] for row in case.ids for value in row)


def test_ids_reach_the_corners() -> None:
    raw = {"vocab_size": 50, "max_seq_len": 20}
    corners: dict[str, Callable[[Ids], bool]] = {
        "longest and widest": lambda ids: len(ids[0]) == 20 and len(ids) == 3,
        "one token": lambda ids: len(ids[0]) == 1,
        "both ends": lambda ids: {0, 49} <= set(ids[0]),
        "last id repeated": lambda ids: len(ids[0]) > 9 and set(ids[0]) == {49},
    }
    seen: set[str] = set()

    @EXAMPLES
    @given(token_ids(raw))
    def draw(ids: Ids) -> None:
        seen.update(name for name, reached in corners.items() if reached(ids))

    draw()
    assert seen == set(corners)


REGRESSIONS = load_regressions()


@pytest.mark.parametrize("kept", REGRESSIONS, ids=lambda kept: kept.name)
def test_regressions_can_be_written_and_read(kept: Regression, tmp_path: Path) -> None:
    config = MPTConfig.from_dict(kept.case.config)
    kept.case.write(tmp_path, "float16")
    assert sorted(Checkpoint.open(tmp_path).names) == sorted(tensor_shapes(kept.case.config))
    assert max(max(row) for row in kept.case.ids) < config.vocab_size
    assert len(kept.case.ids[0]) <= config.max_seq_len


def test_regressions_round_trip(tmp_path: Path) -> None:
    for kept in REGRESSIONS:
        save_regression(kept.name, kept.case, kept.note, tmp_path)
    assert load_regressions(tmp_path) == REGRESSIONS
    with pytest.raises(FileExistsError):
        save_regression(REGRESSIONS[0].name, REGRESSIONS[0].case, "again", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "an object of exactly config, seed, ids, note"),
        ("{", "a.json"),
        ('{"config": {}, "seed": 1, "ids": [[1]]}', "exactly"),
        ('{"config": {}, "seed": 1, "ids": [[1]], "note": "n", "more": 1}', "exactly"),
        ('{"config": [], "seed": 1, "ids": [[1]], "note": "n"}', "config: expected an object"),
        ('{"config": {}, "seed": true, "ids": [[1]], "note": "n"}', "seed"),
        ('{"config": {}, "seed": 1, "ids": [], "note": "n"}', "ids"),
        ('{"config": {}, "seed": 1, "ids": [[1], [1, 2]], "note": "n"}', "ids"),
        ('{"config": {}, "seed": 1, "ids": [[-1]], "note": "n"}', "ids"),
        ('{"config": {}, "seed": 1, "ids": [[true]], "note": "n"}', "ids"),
        ('{"config": {}, "seed": 1, "ids": [[]], "note": "n"}', "ids"),
        ('{"config": {}, "seed": 1, "ids": [[1]], "note": ""}', "note"),
    ],
)
def test_bad_regressions(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(RegressionError, match=message) as caught:
        load_regressions(tmp_path)
    assert "a.json" in str(caught.value)


def test_no_regressions_at_all(tmp_path: Path) -> None:
    with pytest.raises(RegressionError, match="found none"):
        load_regressions(tmp_path)
