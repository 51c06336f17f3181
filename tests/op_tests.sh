#!/usr/bin/env bash
# Names the test files of every op that the build at hand has.
#   PYTHON=... bash tests/op_tests.sh
set -euo pipefail
ops=$("${PYTHON:-.venv/bin/python}" -m mllama_kernels.info --json |
  "${PYTHON:-.venv/bin/python}" -c 'import json, sys; print(*json.load(sys.stdin)["ops"])')
for op in $ops; do # two ops are tested in the file of a third
  for file in "$(dirname "$0")/test_$op"{,_backward,_calls,_int8}.py; do
    if [ -f "$file" ]; then echo "$file"; fi
  done
done
