"""A session that could not run what it was asked to run is red with exit code 3."""

from __future__ import annotations

import pathlib

import pytest

CONFTEST = pathlib.Path(__file__).parents[1] / "conftest.py"
INI = "[pytest]\nmarkers =\n    gpu\n    cuda_build\n"
TESTS = """
    import pytest

    @pytest.mark.gpu
    def test_on_a_device():
        pass

    @pytest.mark.cuda_build
    def test_with_a_compiler():
        pass

    def test_anywhere():
        pass
"""
DEVICE_SEEN = "class cuda:\n    exist = True\n    def __init__(self, index): pass\n"


@pytest.fixture
def session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A suite with one test of each kind, on a machine that shows no CUDA device."""
    # pytester's inner conftest must not ask for pytester itself.
    pytester.makeconftest(CONFTEST.read_text().replace('pytest_plugins = ["pytester"]', ""))
    pytester.makeini(INI)
    pytester.makepyfile(TESTS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(pytester.path))
    return pytester


def test_selected_gpu_tests_without_a_device_are_not_proven(session: pytest.Pytester) -> None:
    result = session.runpytest_subprocess("-m", "gpu")
    assert result.ret == 3
    result.stdout.fnmatch_lines(["*not proven: no CUDA device*1 selected test(s) marked gpu*"])
    result.stdout.no_fnmatch_line("*passed*")


def test_mixed_selection_without_a_device_runs_nothing(session: pytest.Pytester) -> None:
    result = session.runpytest_subprocess("-m", "not cuda_build")
    assert result.ret == 3
    result.stdout.no_fnmatch_line("*passed*")


def test_broken_tvm_is_not_proven(session: pytest.Pytester) -> None:
    session.makepyfile(tvm="raise ImportError('libcuda is gone')")
    result = session.runpytest_subprocess("-m", "gpu")
    assert result.ret == 3
    result.stdout.fnmatch_lines(["*not proven: no CUDA device*libcuda is gone*"])


def test_with_a_device_the_tests_run(session: pytest.Pytester) -> None:
    session.makepyfile(tvm=DEVICE_SEEN)
    result = session.runpytest_subprocess("-m", "gpu")
    assert result.ret == 0
    result.assert_outcomes(passed=1, deselected=2)


def test_missing_compiler_is_not_proven(
    session: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    result = session.runpytest_subprocess("-m", "cuda_build")
    assert result.ret == 3
    result.stdout.fnmatch_lines(["*not proven: no CUDA compiler*"])


def test_deselected_gpu_tests_do_not_touch_tvm(session: pytest.Pytester) -> None:
    session.makepyfile(tvm="raise SystemExit('tvm was imported')")
    result = session.runpytest_subprocess("-m", "not gpu and not cuda_build")
    assert result.ret == 0
    result.assert_outcomes(passed=1, deselected=2)


def test_workers_of_a_parallel_session_cannot_turn_it_green(session: pytest.Pytester) -> None:
    result = session.runpytest_subprocess("-m", "gpu", "-n", "2")
    assert result.ret == 3
    result.stdout.no_fnmatch_line("*passed*")


@pytest.mark.parametrize("how", ["@pytest.mark.skip", "@pytest.mark.skipif(True, reason='r')"])
def test_skipped_test_is_not_proven(session: pytest.Pytester, how: str) -> None:
    session.makepyfile(test_more=f"import pytest\n\n{how}\ndef test_it(): pass\n")
    result = session.runpytest_subprocess("-m", "not gpu and not cuda_build")
    assert result.ret == 3
    result.stdout.fnmatch_lines(["*not proven: 1 test(s) skipped*"])


def test_failure_outranks_a_skip(session: pytest.Pytester) -> None:
    session.makepyfile(
        test_more="import pytest\ndef test_a(): pytest.skip()\ndef test_b(): assert False\n"
    )
    result = session.runpytest_subprocess("-m", "not gpu and not cuda_build")
    assert result.ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_empty_selection_is_not_proven(session: pytest.Pytester, workers: tuple[str, ...]) -> None:
    result = session.runpytest_subprocess("-k", "nothing_is_called_this", *workers)
    assert result.ret == 3
    result.stdout.fnmatch_lines(["*not proven: no test was selected*"])
