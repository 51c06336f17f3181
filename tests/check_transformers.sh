#!/usr/bin/env bash
# The drop-in tests under further releases of transformers, $RELEASES. Each is installed beside the
# environment, not into it; `make test` runs 5.17, which the model is held against.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

read -ra releases <<<"${RELEASES:-4.57.* 5.23.*}"
# All at once: one waits for the network while another unpacks. Bytecode only of what is imported.
running=()
for release in "${releases[@]}"; do
  "$python" -m pip install -q --no-cache-dir --no-compile --target "$work/$release" "transformers==$release" datasets &
  running+=($!)
done
for process in "${running[@]}"; do wait "$process"; done
for release in "${releases[@]}"; do
  PYTHONPATH="$work/$release${PYTHONPATH:+:$PYTHONPATH}" "$python" -m pytest -q tests/test_transformers_*.py
done
