"""A torch module as an ONNX file."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch


def export(module: Any, example: Any, path: Path) -> Path:
    """Write a module for one shape, with torch's own exporter, and return ``path``."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module, (example,), dynamo=True, input_names=["given"], verbose=False
        )
        assert program is not None
        program.save(str(path), external_data=False)
    return path
