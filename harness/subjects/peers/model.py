"""What is known of a peer before it is run: where it comes from and what can be asked of it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.errors import BadInput


class NotSupported(BadInput):
    """A peer has no way to do what is asked, and says so itself or its documentation does.

    That is told apart from a refusal, which is the peer's own error on a particular model, and from
    a divergence.
    """


@dataclass(frozen=True)
class Peer:
    """An implementation of MPT that is not this project's.

    Attributes
    ----------
    name
        After ``peer:`` on the command line.
    summary
        Whose MPT it is and by which route it runs.
    needs
        Import names that have to be there.
    packages
        Distributions whose versions stand beside a result.
    extra
        Of this project's package, as in ``pip install mpt-conformance[EXTRA]``; empty if nothing
        more is needed.
    module
        Holds ``load(checkpoint, *, dtype, target)``.
    dtypes
        Storage dtypes that the peer computes in on a CPU.
    taps
        Whether it shows what is inside a block.
    cannot
        Feature to the reason why it cannot be asked of this peer. What is not listed is asked, and
        the peer shows whether it honours it.
    instead
        Import name to an environment variable that makes up for it.
    version_of
        ``module:function`` that gives the version of a library that is no distribution.
    """

    name: str
    summary: str
    needs: tuple[str, ...]
    packages: tuple[str, ...]
    extra: str
    module: str
    dtypes: tuple[str, ...]
    taps: bool
    cannot: Mapping[str, str] = field(default_factory=dict)
    instead: Mapping[str, str] = field(default_factory=dict)
    version_of: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """Import names that are not there."""
        return tuple(
            name
            for name in self.needs
            if importlib.util.find_spec(name) is None
            and not os.environ.get(self.instead.get(name, ""))
        )

    def versions(self) -> dict[str, str]:
        """Return the versions of `packages`, of those that are there."""
        found = {}
        for package in self.packages:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
        if self.version_of and not self.missing:
            module, _, function = self.version_of.partition(":")
            found[self.name] = getattr(importlib.import_module(module), function)()
        return found

    def require(self, dtype: str) -> None:
        """Refuse what cannot be asked, before anything is loaded.

        Raises
        ------
        BadInput
            If a package is missing.
        NotSupported
            If the peer has no such dtype.
        """
        if self.missing:
            extra = f"pip install mpt-conformance[{self.extra}]" if self.extra else ""
            raise BadInput(
                f"not installed: {', '.join(self.missing)}",
                where=f"--subject peer:{self.name}",
                hint=extra or None,
            )
        if dtype not in self.dtypes:
            raise NotSupported(
                f"{self.name} does not compute in it on a CPU",
                where="--dtype",
                expected=" or ".join(self.dtypes),
                found=dtype,
            )

    def load(self, checkpoint: Path, *, dtype: str, target: str) -> Any:
        """Make the subject; what the peer itself raises is passed on.

        Raises
        ------
        BadInput, NotSupported
            As `require`.
        """
        self.require(dtype)
        with warnings.catch_warnings():
            # Of a peer's libraries, about themselves and each other.
            warnings.simplefilter("ignore")
            module = importlib.import_module(self.module)
            return module.load(checkpoint, dtype=dtype, target=target)
