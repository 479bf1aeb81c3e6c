"""``mpt-conform``: one short function a command; imports wait until they are needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.allocator import keep_freed_memory
from harness.errors import (
    EXIT_CONFORMS,
    EXIT_DIVERGES,
    EXIT_INTERNAL,
    EXIT_NOT_PROVEN,
    BadInput,
    ConformanceError,
    out_of_memory,
    ran_out_of_memory,
)
from harness.ledger.commands import anchor_app, ledger_app

app = typer.Typer(
    help="Is it still MPT? Judge an implementation against a float64 reference, layer by layer.\n\n"
    "Exit codes: 0 conforms, 1 diverges, 2 bad input or usage, 3 not proven, 70 internal error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(ledger_app, name="ledger")
app.add_typer(anchor_app, name="anchor")
EXIT_OF = {"conforms": EXIT_CONFORMS, "diverges": EXIT_DIVERGES, "not-proven": EXIT_NOT_PROVEN}
DTYPES = ("float16", "bfloat16", "float32")

CheckpointArgument = Annotated[
    Path | None, typer.Argument(help="Directory in the hub layout; the shipped one by default.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the whole record here.")]


def _dtype(value: str) -> str:
    if value not in DTYPES:
        raise typer.BadParameter(f"expected {', '.join(DTYPES)}, found {value!r}")
    return value


def _layers(value: str | None) -> frozenset[int] | None:
    """Return the layers of ``0,3-5``."""
    if value is None:
        return None
    chosen: set[int] = set()
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise BadInput("cannot be read", where="--layers", expected="0,3-5", found=repr(value))
        chosen.update(range(int(first), int(last or first) + 1))
    return frozenset(chosen)


class _Progress:
    """A line that overwrites itself on a terminal, and nothing elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._status: Any = None

    def __call__(self, text: str) -> None:
        if not self._console.is_terminal:
            return
        if self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        self._status.update(text)

    def stop(self) -> None:
        if self._status is not None:
            self._status.stop()


def _finish(result: Any, json: Path | None) -> None:
    """Write a result, print its lines, and end with the exit code of its verdict."""
    from harness.report.files import to_json, write_whole

    if json is not None:
        write_whole(json, to_json(result))
    for line in result.lines():
        typer.echo(line)
    raise typer.Exit(EXIT_OF[result.verdict])


@app.command()
def check(
    checkpoint: CheckpointArgument = None,
    subject: Annotated[
        str,
        typer.Option(
            help="relax, torch, transformers, peer:NAME, or module:factory (runs that code)."
        ),
    ] = "relax",
    dtype: Annotated[str, typer.Option(callback=_dtype, help="Storage dtype.")] = "float16",
    target: Annotated[str, typer.Option(help="llvm, cuda, or a TVM target as JSON.")] = "llvm",
    prompts: Annotated[
        str | None, typer.Option(help="Prompt file or directory: .txt, .json or .npy ids.")
    ] = None,
    traces: Annotated[
        Path | None,
        typer.Option(help="Judge this dump of taps (safetensors) instead of a subject."),
    ] = None,
    fault: Annotated[
        str | None, typer.Option(help="Plant a fault: NAME or NAME@LAYER; see `faults`.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Judge these layers only: 0,3-5.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut every prompt after so many tokens.")
    ] = None,
    json: JsonOption = None,
    html: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
    diagnose: Annotated[
        bool, typer.Option(help="After a divergence, name the fault that it looks like.")
    ] = True,
    ledger: Annotated[
        str | None, typer.Option(help="Add the run to this ledger: a file, or a database URL.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Use this compiled model; see `build`.")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            help="Hold one block's weights at a time, from disk; if the model does not fit, anyway."
        ),
    ] = None,
) -> None:
    """Judge a subject on a checkpoint and say where it first diverges."""
    from rich.console import Console

    from harness.pipeline import SHIPPED, Request
    from harness.pipeline import check as run
    from harness.report.evidence import with_evidence
    from harness.report.files import require_writable, to_json, write_whole
    from harness.report.terminal import render

    for place in (json, html):
        if place is not None:
            require_writable(place)
    request = Request(
        checkpoint=checkpoint or SHIPPED,
        subject=subject,
        dtype=dtype,
        target=target,
        prompts=prompts,
        traces=traces,
        fault=fault,
        layers=_layers(layers),
        max_tokens=max_tokens,
        diagnose=diagnose,
        bundle=bundle,
        stream=stream,
    )
    progress = _Progress()
    try:
        report = run(request, progress) if ledger is None else _recorded(ledger, request, progress)
    finally:
        progress.stop()
    report = with_evidence(report)
    if json is not None:
        write_whole(json, to_json(report))
    if html is not None:
        from harness.report.page import page

        write_whole(html, page(report).encode())
    # A file or a pipe has no width: nothing is cut there.
    width = None if sys.stdout.isatty() else 160
    render(report, Console(width=width, highlight=False))
    raise typer.Exit(EXIT_OF[report.verdict])


def _recorded(ledger: str, request: Any, progress: Any) -> Any:
    """Check, and write the run; a ledger that cannot be used is refused before the work."""
    from harness.ledger.record import check_into
    from harness.ledger.store import Ledger

    with Ledger.open(ledger, write=True) as opened:
        return check_into(opened, request, progress)


@app.command()
def build(
    source: Annotated[Path, typer.Argument(help="A checkpoint directory, or a config.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Bundle to write.")],
    dtype: Annotated[str, typer.Option(callback=_dtype, help="Storage dtype.")] = "float16",
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


@app.command()
def gate(
    ledger: Annotated[str, typer.Option(help="A file, or a database URL.")],
    release: Annotated[str, typer.Option(help="Name of the release, for the reports.")],
    policy: Annotated[Path, typer.Option(help="What a release must prove.")] = Path("gate.toml"),
    commit: Annotated[
        str | None, typer.Option(help="What is released; that of this directory by default.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Make the runs that are missing, and record them.")
    ] = False,
    json: JsonOption = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML here.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Append a summary here, as to $GITHUB_STEP_SUMMARY.")
    ] = None,
) -> None:
    """Hold a release's policy against the ledger: what is not proven blocks."""
    from rich.console import Console

    from harness.gate import render
    from harness.gate.command import gate as run
    from harness.report.files import require_writable, to_json, write_whole

    for place in (json, junit, markdown):
        if place is not None:
            require_writable(place)
    progress = _Progress()
    try:
        result = run(policy, ledger, release=release, commit=commit, fresh=fresh, progress=progress)
    finally:
        progress.stop()
    if json is not None:
        write_whole(json, to_json(render.to_plain(result)))
    if junit is not None:
        write_whole(junit, render.junit(result))
    if markdown is not None:
        try:
            with markdown.open("a", encoding="utf-8") as file:
                file.write(render.markdown(result))
        except OSError as error:
            raise BadInput(f"cannot be written: {error.strerror}", where=str(markdown)) from error
    width = None if sys.stdout.isatty() else 160
    render.render(result, Console(width=width, highlight=False))
    raise typer.Exit(EXIT_OF[result.verdict])


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder of pages to make or to replace.")],
    ledger: Annotated[str, typer.Option(help="A file, or a database URL.")],
    policy: Annotated[
        Path | None, typer.Option(help="Show the gate of this policy and its waivers, too.")
    ] = None,
) -> None:
    """Build the dashboard: pages that open from disk, without a network."""
    from harness.dashboard.build import build

    made = build(ledger, out, policy)
    typer.echo(f"{made.index}: {made.runs} runs, {made.pages} pages, {made.seconds:.1f} s")


@app.command()
def trace(
    output: Annotated[Path, typer.Option("--output", "-o", help="Safetensors file to write.")],
    checkpoint: CheckpointArgument = None,
    subject: Annotated[str, typer.Option(help="As in check.")] = "relax",
    dtype: Annotated[str, typer.Option(callback=_dtype)] = "float16",
    target: Annotated[str, typer.Option()] = "llvm",
    prompts: Annotated[str | None, typer.Option()] = None,
    fault: Annotated[str | None, typer.Option()] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Dump every tap of a subject, to be judged elsewhere with `check --traces`."""
    from harness.dump import write_dump
    from harness.pipeline import SHIPPED, Request

    request = Request(
        checkpoint=checkpoint or SHIPPED,
        subject=subject,
        dtype=dtype,
        target=target,
        prompts=prompts,
        fault=fault,
        max_tokens=max_tokens,
    )
    progress = _Progress()
    try:
        written = write_dump(request, output, progress)
    finally:
        progress.stop()
    typer.echo(f"{output}: {written} tensors")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A dump (.safetensors) or a record of check (.json).")],
    b: Annotated[Path, typer.Argument(help="Another of the same kind.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint that two differing dumps are judged on.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Compare two dumps or two runs; limits come from the checkpoint, never from a tolerance."""
    from harness.compare import compare_files
    from harness.report.files import require_writable

    if json is not None:
        require_writable(json)
    result = compare_files(a, b, checkpoint)
    _finish(result, json)


@app.command()
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


@app.command()
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


@app.command("map")
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
    _finish(result, json)


@app.command()
def faults() -> None:
    """List the faults that `check --fault` can plant."""
    from rich.console import Console
    from rich.table import Table

    from harness.faults.library import library

    table = Table(box=None, pad_edge=False)
    for column in ("name", "area", "first tap", "shown by", "what it is"):
        table.add_column(column, overflow="fold")
    for fault in library().values():
        table.add_row(fault.name, fault.area, fault.first_tap, fault.exposure, fault.summary)
    Console().print(table)


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the factors are written.")],
    seeds: Annotated[str, typer.Option(help="FIRST:LAST, each a random checkpoint.")] = "0:120",
    processes: Annotated[int, typer.Option(min=1, help="Seeds judged at once.")] = 1,
) -> None:
    """Measure how far healthy implementations lie beyond the legitimate orders."""
    from harness.calibrate import calibrate as run
    from harness.report.files import to_json, write_whole

    first, colon, last = seeds.partition(":")
    if not colon or not first.isdigit() or not last.isdigit() or int(first) >= int(last):
        raise BadInput("cannot be read", where="--seeds", expected="FIRST:LAST", found=repr(seeds))
    chosen = range(int(first), int(last))
    factors = run(chosen, lambda text: typer.echo(text, err=True), processes)
    write_whole(output, to_json(factors))


@app.command()
def certify(
    target: Annotated[str, typer.Option(help="Of the planted faults.")] = "llvm",
    dtype: Annotated[str, typer.Option(callback=_dtype)] = "float16",
    sample: Annotated[
        int, typer.Option(min=1, help="Run every n-th fault and healthy checkpoint only.")
    ] = 1,
    only: Annotated[
        list[str] | None, typer.Option(help="Run these faults only, and no healthy subject.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=0, help="Healthy checkpoints; many by default.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Keep results here, and go on from those that are there.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="A certificate whose figures must not fall.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="At once.")] = 2,
    json: JsonOption = None,
    html: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
) -> None:
    """Measure how many faults the gate catches and how often it cries wolf."""
    from harness.certify.command import SEEDS, Options, make_certificate, split
    from harness.certify.lines import lines
    from harness.report.files import require_writable, to_json, write_whole

    for place in (json, html):
        if place is not None:
            require_writable(place)
    count = SEEDS if seeds is None else seeds
    options = Options(target, dtype, sample, split(only), count, record, against, processes)
    made, worse = make_certificate(options, lambda text: typer.echo(text, err=True))
    if json is not None:
        write_whole(json, to_json(made))
    if html is not None:
        from harness.certify.page import page

        write_whole(html, page(made).encode())
    for line in (*lines(made), *(f"fell: {text}" for text in worse)):
        typer.echo(line)
    raise typer.Exit(EXIT_DIVERGES if worse else EXIT_CONFORMS)


@app.command()
def peers(
    only: Annotated[
        list[str] | None, typer.Option(help="These only; `relax` is the port. All by default.")
    ] = None,
    feature: Annotated[list[str] | None, typer.Option(help="These features only.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="These storage dtypes only.")] = None,
    healthy: Annotated[
        int, typer.Option(min=0, help="Instead, ask the base config with so many other weights.")
    ] = 0,
    speed: Annotated[
        int, typer.Option(min=0, help="Instead, time so many forwards of each, in turns.")
    ] = 0,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="With --speed.")] = None,
    python: Annotated[
        list[str] | None,
        typer.Option(help="PEER=INTERPRETER, with --speed: a peer of another environment."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="With --speed: wait for a line before the clock starts.")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(help="Keep answers here, and go on from those that are there.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Ask nothing, show the record.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="At once.")] = 1,
    json: JsonOption = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
) -> None:
    """Put every installed MPT through the gate, feature by feature, and draw the table."""
    from harness.peers.command import Options, answer, summary
    from harness.peers.table import markdown as drawn
    from harness.peers.table import page, to_plain
    from harness.report.files import require_writable, to_json, write_whole

    for place in (json, markdown, html):
        if place is not None:
            require_writable(place)
    pairs = [text.partition("=") for text in python or ()]
    if any(not name or not path for name, _, path in pairs):
        raise BadInput("cannot be read", where="--python", expected="PEER=INTERPRETER")
    options = Options(
        only=tuple(only or ()),
        features=tuple(feature or ()),
        dtypes=tuple(_dtype(text) for text in dtype) if dtype else DTYPES,
        healthy=healthy,
        speed=speed,
        threads=tuple(threads or (1, 2)),
        pythons={name: path for name, _, path in pairs},
        record=record,
        processes=processes,
        show=show,
    )

    def ready() -> None:
        if wait:
            typer.echo("ready", err=True)
            sys.stdin.readline()

    cells, speeds = answer(options, lambda text: typer.echo(text, err=True), ready)
    text = drawn(cells, speeds)
    if json is not None:
        write_whole(json, to_json(to_plain(cells, speeds)))
    if markdown is not None:
        write_whole(markdown, text.encode())
    if html is not None:
        write_whole(html, page(cells, speeds).encode())
    typer.echo(text, nl=False)
    if summary(cells):
        typer.echo(summary(cells))


@app.command()
def certificate(
    target: Annotated[str, typer.Argument(help="llvm, or another that was measured.")] = "llvm",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Only the table of published rules.")
    ] = False,
) -> None:
    """Show the certificate that came with the package."""
    from harness.certify.certificate import shipped_certificate
    from harness.certify.lines import lines, table

    found = shipped_certificate(target)
    typer.echo(table(found) if markdown else "\n".join(lines(found)))


@app.command()
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
    dtype: Annotated[str, typer.Option(callback=_dtype)] = "float16",
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


@app.command()
def shrink(
    output: Annotated[Path, typer.Option("--output", "-o", help="Script to write.")],
    checkpoint: CheckpointArgument = None,
    subject: Annotated[str, typer.Option(help="As in check.")] = "relax",
    dtype: Annotated[str, typer.Option(callback=_dtype)] = "float16",
    target: Annotated[str, typer.Option()] = "llvm",
    prompts: Annotated[str | None, typer.Option()] = None,
    fault: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Make a failing check small, and write a script that repeats it."""
    from harness.pipeline import SHIPPED, Request
    from harness.report.files import require_writable
    from harness.shrink.command import lines, write
    from harness.shrink.command import shrink as run

    require_writable(output)
    progress = _Progress()
    try:
        shrunk = run(
            Request(
                checkpoint=checkpoint or SHIPPED,
                subject=subject,
                dtype=dtype,
                target=target,
                prompts=prompts,
                fault=fault,
            ),
            progress,
        )
    finally:
        progress.stop()
    write(shrunk, output)
    for line in (*lines(shrunk), f"python {output}"):
        typer.echo(line)


def main() -> None:
    """Run the command line; a user's mistake ends in one sentence, never in a traceback."""
    keep_freed_memory()
    try:
        # Outside standalone mode an Exit comes back as a number, or raised, as versions please.
        code = app(prog_name="mpt-conform", standalone_mode=False)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.Abort:
        sys.exit(130)
    except ConformanceError as error:
        print(f"mpt-conform: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if ran_out_of_memory(error):
            print(f"mpt-conform: {out_of_memory('this machine')}", file=sys.stderr)
            sys.exit(EXIT_NOT_PROVEN)
        _unexpected(error)
    else:
        sys.exit(code if isinstance(code, int) else EXIT_CONFORMS)


def _unexpected(error: Exception) -> None:
    """Show usage errors as such, and anything else as the internal error it is."""
    import traceback

    show = getattr(error, "show", None)
    if callable(show):
        show()
        sys.exit(getattr(error, "exit_code", 2))
    traceback.print_exc()
    print(
        f"mpt-conform: internal error: {type(error).__name__}: {error} "
        "(this is a bug of mpt-conformance, please report it)",
        file=sys.stderr,
    )
    sys.exit(EXIT_INTERNAL)
