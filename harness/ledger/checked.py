"""From stored fields to a run: what another program wrote is looked at before it is believed."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from harness.errors import BadInput
from harness.ledger.records import Run

VERDICTS = ("conforms", "diverges", "not-proven")
JSON_FIELDS = ("seeds", "environment")
# An id becomes a file's name on the dashboard.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def checked_run(fields: Mapping[str, Any], where: str) -> Run:
    """Return a run from its fields as they are stored.

    Raises
    ------
    BadInput
        If one cannot be what a check has written: an unknown verdict must never count as a pass.
    """
    found = dict(fields)
    place = f"{where}: run {found.get('id')}"
    if not all(isinstance(value, str) for name, value in found.items() if name != "seconds"):
        raise BadInput("is damaged: a field is no text", where=place)
    if not _ID.fullmatch(found["id"]):
        raise BadInput("is damaged: its id is none", where=place)
    if found["verdict"] not in VERDICTS:
        raise BadInput(
            "is damaged: its verdict is none",
            where=place,
            expected=", ".join(VERDICTS),
            found=repr(found["verdict"]),
        )
    try:
        zone = datetime.fromisoformat(found["created"]).tzinfo
    except ValueError:
        zone = None
    if zone is None:
        raise BadInput(
            "is damaged: its time is none",
            where=place,
            expected="ISO 8601 with a zone",
            found=repr(found["created"]),
        )
    for name in JSON_FIELDS:
        try:
            found[name] = json.loads(found[name])
        except ValueError:
            found[name] = None
        if not isinstance(found[name], dict):
            raise BadInput(f"is damaged: {name} cannot be read", where=place)
    return Run(**found)


def unpack(content: bytes, where: str) -> Mapping[str, Any]:
    """Return the details that `store.pack` packed.

    Raises
    ------
    BadInput
        If they cannot be unpacked.
    """
    try:
        found = msgspec.json.decode(zlib.decompress(content))
    except (zlib.error, msgspec.DecodeError, TypeError, UnicodeDecodeError) as error:
        raise BadInput(f"is damaged: its details cannot be read: {error}", where=where) from error
    if not isinstance(found, dict):
        raise BadInput("is damaged: its details are no record", where=where)
    return found
