"""What is declared, what is pinned, what is installed and what is written down are the same."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import pathlib
import re
import sys
import tomllib
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = pathlib.Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
NAME = PROJECT["name"]
ROOMS = ("cases", "harness", "reference", "relax_impl")
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/certificate.md",
    "docs/gate.md",
    "docs/limits.md",
    "docs/own-subject.md",
    "docs/peers.md",
    "docs/stand.md",
)
CUDA_BUILD_OF_TORCH = re.compile(r"nvidia-|cuda-|triton")


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(requirement.name): requirement for requirement in requirements}
    assert len(pinned) == len(requirements) > 0
    return pinned


def pinned_version(requirement: Requirement) -> Version:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"constraints.txt: {requirement} is a range, not a pin"
    return Version(specifier.version)


def declared() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    everything = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    return [r for line in everything if (r := Requirement(line)).name != NAME]


def requirements_of(distribution: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What an installed distribution asks for on this interpreter, with these extras."""
    for line in importlib.metadata.requires(distribution) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def arriving() -> set[str]:
    """Names of all distributions that an installation of this one with its tests brings."""
    seen: set[str] = set()
    waiting = [Requirement(f"{NAME}[test]")]
    while waiting:
        wanted = waiting.pop()
        for requirement in requirements_of(wanted.name, frozenset(wanted.extras)):
            name = canonicalize_name(requirement.name)
            from_cuda = wanted.name == "torch" and CUDA_BUILD_OF_TORCH.match(name)
            if name not in seen and not from_cuda:
                seen.add(name)
                waiting.append(requirement)
    return seen


@pytest.mark.parametrize("requirement", declared(), ids=lambda requirement: requirement.name)
def test_declared_dependency_is_pinned_inside_its_range(requirement: Requirement) -> None:
    version = pinned_version(pins()[canonicalize_name(requirement.name)])
    assert requirement.specifier, f"pyproject.toml: {requirement.name} has no range"
    assert requirement.specifier.contains(version, prereleases=True)


def test_everything_that_arrives_is_pinned_and_installed_at_its_pin() -> None:
    pinned = pins()
    names = arriving()
    assert names > {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert sorted(names - pinned.keys()) == [], "constraints.txt lacks these"
    installed = {name: Version(importlib.metadata.version(name)).public for name in names}
    assert installed == {name: pinned_version(pinned[name]).public for name in names}


def test_pins_name_no_place() -> None:
    for requirement in pins().values():
        assert requirement.url is None
        assert pinned_version(requirement).local is None, f"{requirement} exists on one index only"


def test_port_and_ffi_are_the_pair_that_is_proven() -> None:
    ranges = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}
    assert not ranges["apache-tvm-ffi"].contains("0.1.15")


SCRIPTS = tuple(PYPROJECT["tool"]["setuptools"]["py-modules"])
"""Modules at the root that are installed beside the rooms."""


def third_party_imports() -> dict[str, str]:
    """Top-level names that the rooms import from outside, each with a file that does."""
    imported: dict[str, str] = {}
    for path in [*(p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py")))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                imported[name.split(".")[0]] = str(path.relative_to(ROOT))
    ours = {*ROOMS, *SCRIPTS, *sys.stdlib_module_names}
    return {name: where for name, where in imported.items() if name not in ours}


OPTIONAL = ("ctranslate2", "llama-cpp", "onnxruntime", "openvino", "parquet", "postgres")
"""Extras of a user's, whose imports say what to install where they are missing."""


def test_rooms_import_only_what_is_declared() -> None:
    optional = (line for extra in OPTIONAL for line in PROJECT["optional-dependencies"][extra])
    lines = [*PROJECT["dependencies"], *optional]
    wanted = {canonicalize_name(Requirement(line).name) for line in lines}
    providers = importlib.metadata.packages_distributions()
    imports = third_party_imports()
    assert "numpy" in imports
    undeclared = {
        name: where
        for name, where in imports.items()
        # What is not installed here goes by the name under which it is imported.
        if not wanted & {canonicalize_name(found) for found in providers.get(name, [name])}
    }
    assert undeclared == {}


@pytest.mark.parametrize("room", ROOMS)
def test_installed_room_holds_every_file_of_the_tree(room: str) -> None:
    """In tox the installed room is the wheel's, so a file that package-data forgets is red."""
    module = importlib.import_module(room)
    installed = pathlib.Path(module.__file__ or "").parent

    def files(top: pathlib.Path) -> set[str]:
        found = (path.relative_to(top) for path in top.rglob("*") if path.is_file())
        return {str(path) for path in found if "__pycache__" not in path.parts}

    in_tree = files(ROOT / room)
    assert "__init__.py" in in_tree
    assert sorted(in_tree - files(installed)) == []


def test_version_is_the_same_everywhere() -> None:
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released, "CHANGELOG.md names no version"
    assert released[0] == PROJECT["version"] == importlib.metadata.version(NAME)


def commands(document: str) -> list[str]:
    """Lines after a prompt in the console blocks of a document, split at `&&`."""
    blocks = re.findall(r"^```console\n(.*?)^```$", (ROOT / document).read_text(), re.M | re.S)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [part.strip() for line in lines for part in line.split("&&")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_a_document_are_there(document: str) -> None:
    shell = {".", "cd", "git", "python", "python3"}
    known = {*PROJECT["scripts"], *pins(), "lint-imports", *shell}
    found = commands(document)
    assert found, f"{document} shows no command"
    for command in found:
        words = command.split()
        assert words[0] in known, f"{document}: nothing provides {words[0]!r} of {command!r}"
        for word in words[1:]:
            if word.endswith((".py", ".txt", ".toml")) or word.startswith("tests/"):
                assert (ROOT / word).exists(), f"{document}: {command!r} names {word}, not there"
