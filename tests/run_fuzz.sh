#!/usr/bin/env bash
# Calls the ops with hostile arguments under g++'s address and undefined-behaviour sanitizers: builds the CPU
# kernels of this machine's instruction set (or that of MLLAMA_KERNELS_SANITIZE) with them, then runs
# tests/fuzz_ops.py, and without --case tests/fuzz_folders.py.
#   bash tests/run_fuzz.sh [arguments of fuzz_ops.py]        such as --seconds 120 --seed 1, or --case 4711
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export CXX=${CXX:-g++}
libraries=""
for name in libasan.so libubsan.so libstdc++.so; do # ahead of what a Python without sanitizers loads
  path=$($CXX -print-file-name=$name)
  case $path in /*) libraries+=" $path" ;; *) echo "skipped: $CXX has no $name" && exit 0 ;; esac
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Not by pip, which would leave these objects among those of ordinary builds.
MLLAMA_KERNELS_SANITIZE=${MLLAMA_KERNELS_SANITIZE:-1} MLLAMA_KERNELS_CUDA=0 "$python" setup.py -q build \
  --build-base "$work/build" --build-lib "$work/site" >"$work/log" 2>&1 || { cat "$work/log" && exit 1; }
# New memory reads as NaN. Python and torch leave memory behind at exit. The fake stack for uses after return
# is not aligned for vectors of 64 bytes.
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1
ASAN_OPTIONS+=:max_allocation_size_mb=2048:hard_rss_limit_mb=4096:quarantine_size_mb=64
ASAN_OPTIONS+=:malloc_fill_byte=255:max_malloc_fill_size=1073741824
export UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONPATH=$work/site
sanitized() { LD_PRELOAD=$libraries "$python" "$@"; }
status=0
case " $* " in
*" --case"*) sanitized tests/fuzz_ops.py "$@" || status=$? ;;
*) # each takes one core
  sanitized tests/fuzz_folders.py --seconds 60 &
  folders=$!
  sanitized tests/fuzz_ops.py "$@" || status=$?
  wait $folders || status=$?
  ;;
esac
exit $status
