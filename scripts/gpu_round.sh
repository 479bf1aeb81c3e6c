#!/usr/bin/env bash
# Everything that needs a CUDA device, in one go; for a host with a GPU, also one without network.
#
#   scripts/gpu_round.sh [-k KIT]... [-o OUT] [STEP ...]
#
#   -k KIT   folder with an unpack.sh that makes TVM and Python packages importable, sourced first;
#            may be repeated. Not needed where `python -c 'import tvm'` works.
#   -o OUT   where logs and records go (default: a new temporary folder)
#   STEP     any of: versions tests tox check fault bench decode bundle gate  (default: versions tests check fault)
#
# Every step runs, whatever the others do; the exit code is that of the first that failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
out=
while getopts k:o: option; do
  case $option in
    # shellcheck disable=SC1091
    k) . "$OPTARG/unpack.sh" ;;
    o) out=$OPTARG ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
: "${out:=$(mktemp -d)}"
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$out/.cache}
status=0

# Run one step: keep its output, say how it ended and how long it took.
step() {
  local name=$1 expected=$2 start=$SECONDS code
  shift 2
  "$@" > "$out/$name.log" 2>&1
  code=$?
  echo "== $name: exit code $code (expected $expected), $((SECONDS - start)) s"
  if [ "$code" -ne "$expected" ]; then
    tail -n 40 "$out/$name.log"
    [ "$status" -ne 0 ] || status=1
  fi
}

conform() { "$python" -c 'from harness.cli import main; main()' "$@"; }

for name in "${@:-versions tests check fault}"; do
  for one in $name; do
    case $one in
      versions)
        step versions 0 "$python" -c '
import platform, torch, transformers, tvm, tvm_ffi
print(torch.cuda.get_device_name(0), "python", platform.python_version(), "torch", torch.__version__,
      "transformers", transformers.__version__, "tvm", tvm.__version__, "ffi", tvm_ffi.__version__)
assert tvm.cuda(0).exist'
        cat "$out/versions.log" ;;
      tests) step tests 0 "$python" -m pytest -p no:cacheprovider -q -m gpu tests; tail -n 3 "$out/tests.log" ;;
      tox) step tox 0 "$python" -m tox -e gpu; tail -n 3 "$out/tox.log" ;;
      check)
        for dtype in float16 bfloat16 float32; do
          step "check-$dtype" 0 conform check --target cuda --dtype "$dtype" --json "$out/check-$dtype.json"
          tail -n 4 "$out/check-$dtype.log"
        done ;;
      fault)
        step fault 1 conform check --target cuda --fault alibi-inverse-square@1 --json "$out/fault.json"
        head -n 12 "$out/fault.log" ;;
      bench) step bench 0 "$python" benchmarks/gpu.py --output "$out/bench.json"; cat "$out/bench.log" ;;
      decode) step decode 0 "$python" benchmarks/gpu.py --lengths --decode --batch 1 8 --output "$out/decode.json"
        cat "$out/decode.log" ;;
      bundle)  # Built elsewhere: BUNDLE=FILE; otherwise here.
        tiny=cases/checkpoints/mpt-tiny-english
        bundle=${BUNDLE:-$out/model.bundle}
        [ -n "${BUNDLE:-}" ] || step build 0 conform build "$tiny" --target cuda -o "$bundle"
        step bundle 0 conform check "$tiny" --target cuda --bundle "$bundle" --json "$out/bundle.json"
        tail -n 4 "$out/bundle.log" ;;
      gate) step gate 0 "$python" benchmarks/gate_7b.py --output "$out" --verbose
        grep -v "^ *[0-9.]* s    " "$out/gate.log" ;;
      *) echo "no such step: $one" >&2; exit 2 ;;
    esac
  done
done
echo "logs in $out"
exit "$status"
