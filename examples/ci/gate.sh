#!/usr/bin/env bash
# The gate and the dashboard, in any pipeline: gate.sh POLICY RELEASE
# LEDGER names a file or a database; results go to out/. Exit codes as of `mpt-conform gate`.
set -euo pipefail
policy="${1:-examples/ci/gate.toml}"
release="${2:-unnamed}"
ledger="${LEDGER:-ledger.db}"
mkdir -p out

code=0
mpt-conform gate --release "$release" --policy "$policy" --ledger "$ledger" --fresh \
  --json out/gate.json --junit out/gate.xml --markdown "${GITHUB_STEP_SUMMARY:-out/gate.md}" || code=$?
# A release that is blocked is the one whose pages are wanted most.
mpt-conform report --out out/site --ledger "$ledger" --policy "$policy"
exit "$code"
