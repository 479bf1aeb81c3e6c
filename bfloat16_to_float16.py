"""Convert a checkpoint's weights to float16, beside the original.

Reads the Hugging Face layouts (pytorch_model*.bin or model*.safetensors, in one file or sharded),
one tensor at a time, and writes <MODEL_DIR>-float16 with safetensors shards, the configuration with
its dtype changed, and the files beside the weights. The new directory appears under its name only
when all of it is on disk; a run that was interrupted is taken up where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.checkpoint.float16 import (
    DEFAULT_SHARD_BYTES,
    ConversionRefused,
    ConversionReport,
    convert,
)
from harness.checkpoint.progress import shown
from harness.errors import BadInput

_EXITS = "exit status: 0 converted; 2 nothing converted, and one sentence says why; 130 interrupted"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="bfloat16_to_float16.py",
        description=__doc__,
        epilog=_EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "model_dir",
        metavar="MODEL_DIR",
        nargs="?",
        type=Path,
        default=Path("dist/models/mpt-7b-instruct"),
        help="checkpoint directory (default: %(default)s)",
    )
    made.add_argument(
        "--weights-only",
        action="store_true",
        help="write weights and config.json; leave tokenizer and other files behind",
    )
    made.add_argument(
        "--allow-overflow",
        action="store_true",
        help="accept weights that are infinite or NaN in float16",
    )
    made.add_argument("--force", action="store_true", help="replace a target that exists")
    made.add_argument(
        "--max-shard-bytes",
        metavar="N",
        type=int,
        default=DEFAULT_SHARD_BYTES,
        help="most bytes of tensor data in one shard (default: %(default)s)",
    )
    made.add_argument("--json", metavar="FILE", type=Path, help="write the report to FILE too")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit status."""
    options = parser().parse_args(arguments)
    try:
        with shown("converting") as progress:
            report = convert(
                options.model_dir,
                max_shard_bytes=options.max_shard_bytes,
                weights_only=options.weights_only,
                allow_overflow=options.allow_overflow,
                force=options.force,
                progress=progress,
            )
        _show(report, options.json)
    except ConversionRefused as refusal:
        _show(refusal.report, options.json)
        print(f"error: {refusal}", file=sys.stderr)
        return refusal.exit_code
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run again to go on from the last finished shard", file=sys.stderr)
        return 130
    rate = report.bytes_read / report.seconds / 1e9
    print(f"wrote {report.target} in {report.seconds:.1f} s ({rate:.2f} GB/s read)")
    if report.kept_shards:
        print(f"{len(report.kept_shards)} shards of an earlier run were verified and kept")
    return 0


def _show(report: ConversionReport, file: Path | None) -> None:
    for line in report.lines():
        print(line)
    if file is not None:
        try:
            file.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
        except OSError as error:
            raise BadInput(
                f"the report cannot be written: {error.strerror}", where=str(file)
            ) from error


if __name__ == "__main__":
    sys.exit(main())
