#!/usr/bin/env bash
# Runs the op tests on the CUDA kernels without a GPU: builds with MLLAMA_KERNELS_SIMULATE=1 (PTX, CUDA code
# behind CPU tensors) and puts a libcudart that executes PTX on the host in front of the real one. Without pytest
# arguments it compares the static figures of benchmarks/ too.
#   bash tests/run_simulated.sh <folder of the simulator's sources> [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
simulator=${1:?"usage: run_simulated.sh <folder of the simulator's sources> [pytest arguments]"}
shift
if [ ! -d "$simulator" ]; then
  echo "skipped: no simulator at $simulator"
  exit 0
fi
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$simulator" "$work/simulator"
make -s -C "$work/simulator" -j2 >/dev/null
MLLAMA_KERNELS_SIMULATE=1 MLLAMA_KERNELS_CUDA=1 \
  "$python" -m pip install -q --no-deps --no-build-isolation --target "$work/site" .
export PYTHONPATH=$work/site LD_LIBRARY_PATH=$work/simulator/build CUDASIM_RACECHECK=1 CUDASIM_THREADS=${CUDASIM_THREADS:-2}
export OMP_NUM_THREADS=1
# From another folder, so that the simulated build is imported and not the source tree.
tests=$PWD/tests
cd "$work"
case $python in /*) ;; *) python=$OLDPWD/$python ;; esac
names=$(PYTHON=$python bash "$tests/op_tests.sh")
readarray -t files <<<"$names"
for arch in 80 90; do
  echo "compute capability ${arch:0:1}.${arch:1}"
  CUDASIM_ARCH=$arch "$python" -m pytest -c "$tests/../pyproject.toml" --rootdir "$tests" -p no:cacheprovider "$@" \
    "$tests"/test_{strides,hostile_ops,devices,quantize,quantized_tensor,quantized_numerics}.py "${files[@]}"
done

if [ $# -eq 0 ]; then
  echo "compute capability 8.6, for what runs otherwise in less shared memory"
  CUDASIM_ARCH=86 "$python" -m pytest -c "$tests/../pyproject.toml" --rootdir "$tests" -p no:cacheprovider \
    "$tests/test_rms_norm.py" -k gradient
  echo "static figures"
  cd "$tests/.."
  "$python" -m benchmarks.static "$work/site" "$work/simulator" --check
fi
