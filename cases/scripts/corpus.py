"""Six novels of Jane Austen, read from Debian's `r-cran-janeaustenr`, as one list of (title, text).

The texts are in the public domain (their author died in 1817; the package took them from Project
Gutenberg). They are not committed here: this module fetches the package with `apt-get download`,
unpacks it with `dpkg-deb` and reads the R data base inside, which needs no R.

The data base `Rdata.rdb` is a row of records: a 4-byte big-endian length of the unpacked record,
then a zlib stream (or a type letter and an xz stream) of one R object in the XDR serialisation.
`Rdata.rdx` says where each record lies. Here only character vectors are understood.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import lzma
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "r-cran-janeaustenr"
DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata"
LICENCE = "public domain (Jane Austen, 1775-1817; Project Gutenberg's texts)"

_SYMBOL, _PAIRS, _CHARACTERS, _LOGICALS, _INTEGERS, _STRINGS, _LIST = 1, 2, 9, 10, 13, 16, 19
_END, _REFERENCE = 254, 255
_HAS_ATTRIBUTES, _HAS_TAG = 0x200, 0x400


@dataclass(frozen=True)
class Book:
    """One novel: its name in the package and its text with R's line structure kept."""

    name: str
    text: str


def fetch(cache: Path) -> Path:
    """Download and unpack the package into `cache` once; return the unpacked root.

    Raises
    ------
    SystemExit
        When apt cannot download it; the message says which command to run.
    """
    root = cache / "unpacked"
    if (root / (DATABASE + ".rdb")).is_file():
        return root
    cache.mkdir(parents=True, exist_ok=True)
    answer = subprocess.run(["apt-get", "download", PACKAGE], cwd=cache, capture_output=True)
    archives = sorted(cache.glob(f"{PACKAGE}_*.deb"))
    if answer.returncode or not archives:
        raise SystemExit(
            f"{PACKAGE}: apt-get download failed: {answer.stderr.decode().strip()} "
            "(run 'apt-get update' first)"
        )
    subprocess.run(["dpkg-deb", "-x", str(archives[-1]), str(root)], check=True)
    return root


class _Reader:
    """Reads one R object in XDR format."""

    def __init__(self, data: bytes) -> None:
        if data[:2] != b"X\n":
            raise ValueError(f"not an XDR serialisation: starts {data[:2]!r}")
        self.data, self.at = data, 2
        version = self.integer()
        self.at += 8
        if version == 3:
            encoding = self.integer()  # read first: it moves self.at too
            self.at += encoding
        self.symbols: list[str] = []

    def integer(self) -> int:
        (value,) = struct.unpack_from(">i", self.data, self.at)
        self.at += 4
        return int(value)

    def characters(self) -> str:
        """A CHARSXP after its flags: a length (-1: missing) and bytes."""
        length = self.integer()
        if length < 0:
            return ""
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw.decode("latin-1")

    def item(self) -> object:
        flags = self.integer()
        kind = flags & 0xFF
        if kind == _END:
            return None
        if kind == _REFERENCE:
            return self.symbols[(flags >> 8) - 1]
        if kind == _SYMBOL:
            name = str(self.item())
            self.symbols.append(name)
            return name
        if kind == _CHARACTERS:
            return self.characters()
        if kind == _PAIRS:
            return self.pairs(flags)
        value: list[object]
        if kind in (_STRINGS, _LIST):
            value = [self.item() for _ in range(self.integer())]
        elif kind in (_LOGICALS, _INTEGERS):
            value = [self.integer() for _ in range(self.integer())]
        else:
            raise ValueError(f"R type {kind} at byte {self.at} is not a character vector")
        if flags & _HAS_ATTRIBUTES:
            names = self.item()
            if isinstance(names, dict) and "names" in names:
                return dict(zip(names["names"], value, strict=True))
        return value

    def pairs(self, flags: int) -> dict[str, object]:
        out: dict[str, object] = {}
        while flags & 0xFF == _PAIRS:
            if flags & _HAS_ATTRIBUTES:
                self.item()
            tag = str(self.item()) if flags & _HAS_TAG else ""
            out[tag] = self.item()
            flags = self.integer()
        return out


def _unpack(record: bytes) -> bytes:
    if record[4:5] == b"Z":
        return lzma.decompress(
            record[5:], format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}]
        )
    return zlib.decompress(record[4:])


def books(root: Path) -> tuple[Book, ...]:
    """Every novel of the unpacked package, in alphabetical order of its name there."""
    base = root / DATABASE
    index = _Reader(gzip.decompress(base.with_suffix(".rdx").read_bytes())).item()
    assert isinstance(index, dict)
    data = base.with_suffix(".rdb").read_bytes()
    out = []
    for name, place in sorted(index["variables"].items()):
        start, length = place
        lines = _Reader(_unpack(data[start : start + length])).item()
        if isinstance(lines, list) and lines and all(isinstance(line, str) for line in lines):
            out.append(Book(name, "\n".join(str(line) for line in lines).strip() + "\n"))
    if not out:
        raise ValueError(f"{base}.rdb: no character vector found")
    return tuple(out)


def main(arguments: list[str]) -> None:
    """Print what the corpus holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=Path("build/corpus"))
    for book in books(fetch(parser.parse_args(arguments).cache)):
        digest = hashlib.sha256(book.text.encode()).hexdigest()[:16]
        print(f"{book.name:24} {len(book.text):9,d} characters  sha256 {digest}")


if __name__ == "__main__":
    main(sys.argv[1:])
