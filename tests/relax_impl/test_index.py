"""A model that was compiled is found again without building its graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from relax_impl import compile as compiling
from relax_impl import index
from relax_impl.compile import compile_model
from relax_impl.config import MPTConfig
from relax_impl.operations import PLAIN

CONFIG = MPTConfig.from_dict(
    {
        "d_model": 32,
        "n_heads": 2,
        "n_layers": 1,
        "expansion_ratio": 1,
        "max_seq_len": 16,
        "vocab_size": 19,
        "no_bias": True,
        "attn_config": {"alibi": True},
    }
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return compiling.cache_directory()


def test_a_note_spares_the_graph(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_model(CONFIG, "float32")
    notes = list(cache.glob("*.json"))
    assert len(notes) == 1

    def build(*arguments: object, **options: object) -> None:
        raise AssertionError("the graph was built again")

    with monkeypatch.context() as patched:
        patched.setattr(compiling, "build_graph", build)
        second = compile_model(CONFIG, "float32")
        assert replace(second, executable=None, cached=False) == replace(first, executable=None)
        assert second.cached
        for other in (replace(CONFIG, clip_qkv=1.0), replace(CONFIG, layer_norm_epsilon=1e-6)):
            with pytest.raises(AssertionError, match="built again"):
                compile_model(other, "float32")
        with pytest.raises(AssertionError, match="built again"):
            compile_model(CONFIG, "float16")
        with pytest.raises(AssertionError, match="built again"):
            compile_model(CONFIG, "float32", operations=lambda layer: PLAIN)
        with pytest.raises(AssertionError, match="built again"):
            compile_model(CONFIG, "float32", whole=False)
        # Another version of any source file may make another library of the same config.
        patched.setattr(index, "sources", lambda: "other")
        with pytest.raises(AssertionError, match="built again"):
            compile_model(CONFIG, "float32")

    # A note that cannot be used, or whose library is gone or spoilt, is made anew.
    for spoil in (
        lambda: notes[0].write_text("{"),
        lambda: notes[0].write_text("[]"),
        # In place it would be changed under the process that has it mapped.
        lambda: (first.path.unlink(), first.path.write_bytes(b"no library")),
        lambda: first.path.unlink(),
    ):
        spoil()
        again = compile_model(CONFIG, "float32")
        assert again.path == first.path
        assert again.executable is not None
