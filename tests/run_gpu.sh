#!/usr/bin/env bash
# On a machine with a GPU: the whole suite, then the op tests' reduced grid under compute-sanitizer.
#   bash tests/run_gpu.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
  echo "no CUDA device on this machine" >&2
  exit 1
}
"$python" -m pytest -m "full or not full" "$@"
files=$(PYTHON=$python bash tests/op_tests.sh)
export MLLAMA_TEST_REDUCED=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck initcheck synccheck; do
  echo "=== compute-sanitizer --tool $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-name regex:mllama \
    "$python" -m pytest -q -x -k "cuda and not torch_machinery" --timeout 3000 \
    tests/test_{strides,devices}.py $files
done
