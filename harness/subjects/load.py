"""From a name on the command line to a subject."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import (
    BadInput,
    ConformanceError,
    NotProven,
    out_of_memory,
    ran_out_of_memory,
)
from harness.subjects.protocol import Subject, validate

if TYPE_CHECKING:
    from harness.faults.model import Planted

BUILT_IN = ("relax", "torch", "transformers")
STREAMED = ("relax", "torch")
"""Subjects that can hold the weights of one layer at a time."""
PEER = "peer:"
"""Before the name of somebody else's MPT, see `harness.subjects.peers`."""


@dataclass(frozen=True)
class Loaded:
    """A subject and what became of loading it.

    Attributes
    ----------
    subject
        ``None`` if loading failed, which is the subject's own failure.
    failure
        One sentence, and ``detail`` its traceback.
    """

    subject: Subject | None
    failure: str = ""
    detail: str = ""


def load_subject(
    name: str,
    checkpoint: Path,
    *,
    dtype: str,
    target: str,
    fault: Planted | None = None,
    bundle: Path | None = None,
    stream: bool = False,
) -> Loaded:
    """Make a subject.

    Parameters
    ----------
    name
        ``relax``, ``torch``, ``transformers``, ``peer:NAME`` or ``package.module:factory``; the
        latter imports and runs that code.
    checkpoint
        Directory in the hub layout.
    dtype, target
        Storage dtype and compilation target.
    fault
        A fault to plant, ``relax`` only.
    bundle
        A compiled model to use, ``relax`` only, and without a fault.
    stream
        Hold the weights of one layer at a time; `STREAMED` only, and without a bundle.

    Raises
    ------
    BadInput
        If there is no such subject, or what the factory returns does not speak the protocol.
    """
    if fault is not None and name != "relax":
        raise BadInput("faults can only be planted in the relax subject", where="--fault")
    if bundle is not None and (fault is not None or name != "relax"):
        raise BadInput("only the relax subject without a fault comes in one", where="--bundle")
    if stream and name not in STREAMED:
        raise BadInput(
            "loads its weights itself",
            where=f"--stream with --subject {name}",
            expected=" or ".join(STREAMED),
        )
    if stream and bundle is not None:
        raise BadInput("a bundle holds the whole model", where="--stream with --bundle")
    if name == "relax":
        from harness.subjects.relax import load as load_relax

        return _guarded(
            lambda: load_relax(
                checkpoint, dtype=dtype, target=target, fault=fault, bundle=bundle, stream=stream
            ),
            name,
        )
    if name == "torch":
        from harness.subjects.torch import load as load_torch

        return _guarded(
            lambda: load_torch(checkpoint, dtype=dtype, target=target, stream=stream), name
        )
    if name == "transformers":
        from harness.subjects.transformers import load as load_transformers

        return _guarded(lambda: load_transformers(checkpoint, dtype=dtype, target=target), name)
    if name.startswith(PEER):
        from harness.subjects.peers.registry import peer

        chosen = peer(name.removeprefix(PEER))
        return _guarded(lambda: chosen.load(checkpoint, dtype=dtype, target=target), name)
    factory = _factory(name)
    return _guarded(lambda: factory(checkpoint, dtype=dtype, target=target), name)


def _guarded(make: Callable[[], Any], name: str) -> Loaded:
    try:
        made = make()
    except (ConformanceError, NotProven):
        raise
    except Exception as error:
        if ran_out_of_memory(error):
            raise out_of_memory(f"loading {name}") from error
        import traceback

        text = f"loading {name} raised {type(error).__name__}: {error}"
        return Loaded(None, text, traceback.format_exc())
    return Loaded(validate(made, name))


def _factory(name: str) -> Callable[..., Any]:
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise BadInput(
            "unknown subject",
            where="--subject",
            expected=", ".join(BUILT_IN) + ", peer:NAME or package.module:factory",
            found=repr(name),
        )
    # The user's module usually lies where they stand, as with `python -m`.
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise BadInput(f"importing it failed: {error}", where=f"--subject {name}") from error
        raise BadInput(f"there is no module {error.name!r}", where=f"--subject {name}") from error
    except Exception as error:
        text = f"importing it raised {type(error).__name__}: {error}"
        raise BadInput(text, where=f"--subject {name}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise BadInput(
            f"module {module_name} has no callable {attribute!r}", where=f"--subject {name}"
        )
    return factory  # type: ignore[no-any-return]
