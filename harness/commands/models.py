"""Commands about one model: build, convert, topology, map, generate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.commands.options import CheckpointArgument, JsonOption, dtype_name, finish
from harness.errors import EXIT_DIVERGES, BadInput


def build(
    source: Annotated[Path, typer.Argument(help="A checkpoint directory, or a config.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Bundle to write.")],
    dtype: Annotated[str, typer.Option(callback=dtype_name, help="Storage dtype.")] = "float16",
    target: Annotated[str, typer.Option(help="llvm or cuda.")] = "llvm",
    arch: Annotated[str | None, typer.Option(help="Of the CUDA device; sm_90a by default.")] = None,
) -> None:
    """Compile the port into a bundle for `check --bundle`; for cuda with nvcc, without a device."""
    from harness.checkpoint.strict_json import read_object
    from harness.pipeline import parse_config
    from harness.report.files import require_writable
    from relax_impl.bundle import BundleError
    from relax_impl.bundle import build as run
    from relax_impl.config import MPTConfig

    require_writable(output)
    path = source / "config.json" if source.is_dir() else source
    raw = read_object(path)
    parse_config(raw, str(path))
    try:
        made = run(MPTConfig.from_dict(raw), dtype, target, output, arch=arch)
    except BundleError as error:
        raise BadInput(str(error), where="build") from error
    typer.echo(f"{output}: {made['bytes']} bytes of library, sha256 {made['sha256'][:16]}")


def convert(
    model_dir: Annotated[Path, typer.Argument(help="Checkpoint directory.")],
    weights_only: Annotated[
        bool,
        typer.Option("--weights-only", help="Leave tokenizer and other files behind."),
    ] = False,
    allow_overflow: Annotated[
        bool,
        typer.Option("--allow-overflow", help="Accept weights infinite or NaN in float16."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing result.")] = False,
    max_shard_bytes: Annotated[
        int | None, typer.Option(min=1, help="Most bytes of tensor data in one shard.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Convert a checkpoint to float16 beside it: bfloat16_to_float16.py under another name."""
    from bfloat16_to_float16 import main as run

    words = [str(model_dir)]
    words += ["--weights-only"] * weights_only
    words += ["--allow-overflow"] * allow_overflow
    words += ["--force"] * force
    if max_shard_bytes is not None:
        words += ["--max-shard-bytes", str(max_shard_bytes)]
    if json is not None:
        words += ["--json", str(json)]
    raise typer.Exit(run(words))


def topology(
    source: Annotated[Path, typer.Argument(help="A config.json, or a directory that holds one.")],
) -> None:
    """Print the tensors a config demands, one a line."""
    from harness.checkpoint.strict_json import read_object
    from harness.pipeline import parse_config
    from harness.tensors import topology_of

    path = source / "config.json" if source.is_dir() else source
    raw = read_object(path)
    parse_config(raw, str(path))
    for name, shape in topology_of(raw).items():
        typer.echo(f"{name} torch.Size({list(shape)})")


def map_(
    checkpoint: CheckpointArgument = None,
    fault: Annotated[
        str | None, typer.Option(help="Plant a fault in the mapper; see `faults`.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Prove that the weight mapper consumes every tensor once and puts it in the right place."""
    from harness.mapping import prove_mapping
    from harness.pipeline import SHIPPED
    from harness.report.files import require_writable

    if json is not None:
        require_writable(json)
    result = prove_mapping(checkpoint or SHIPPED, fault)
    finish(result, json)


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="Directory in the hub layout.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that reach this sum.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    chunk: Annotated[int | None, typer.Option(help="Tokens of the prompt a call.")] = None,
    dtype: Annotated[str, typer.Option(callback=dtype_name)] = "float16",
    target: Annotated[str, typer.Option(help="llvm, cuda, or a TVM target as JSON.")] = "llvm",
    ignore_stop: Annotated[
        bool, typer.Option("--ignore-stop", help="Go on after a stop token.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare with full recomputation and the reference."),
    ] = False,
    json: Annotated[
        Path | None,
        typer.Option(help="Write the record here; - for standard output, text to the other one."),
    ] = None,
) -> None:
    """Generate text with the port's cache; tokens per second at the end."""
    from harness.generate.command import GenerateRequest, run, summary
    from harness.generate.sampling import Sampling
    from harness.report.files import require_writable, to_json, write_whole

    piped = json is not None and str(json) == "-"
    if json is not None and not piped:
        require_writable(json)
    sampling = Sampling(temperature, top_p, seed)
    request = GenerateRequest(
        checkpoint, prompt, max_new_tokens, sampling, chunk, dtype, target, ignore_stop, verify
    )
    made = run(request, lambda text: print(text, end="", flush=True, file=_text_stream(piped)))
    print(file=_text_stream(piped))
    typer.echo(summary(made), err=True)
    if piped:
        typer.echo(to_json(made).decode(), nl=False)
    elif json is not None:
        write_whole(json, to_json(made))
    if made.agreement is not None:
        typer.echo(made.agreement.summary, err=True)
        if not made.agreement.holds:
            raise typer.Exit(EXIT_DIVERGES)


def _text_stream(piped: bool) -> Any:
    return sys.stderr if piped else sys.stdout
