#!/usr/bin/env bash
# The modeling tests of `transformers` itself, on accelerated models and on plain ones: exits 1 with the
# names of those that pass plain and fail accelerated.
#
#   tests/check_transformers_suite.sh SOURCE_TREE [pytest arguments]
#
# SOURCE_TREE: an unpacked repository of transformers with its tests/models, which packages on PyPI lack:
#   git clone --depth 1 --branch v5.23.0 https://github.com/huggingface/transformers
# Its own src/ is what runs, or another release that PYTHONPATH has. FAMILIES (default "mllama llama
# llava") says which tests. What they need is installed beside the environment.
# Tests that differ run a second time, since some of them are random.
set -euo pipefail
tree=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
root=$PWD
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip install -q --no-cache-dir --target "$work/site" parameterized requests
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$tree/src:$work/site:$root:$root/tests"
export HF_HUB_OFFLINE=1

files=()
for family in ${FAMILIES:-mllama llama llava}; do
  files+=("tests/models/$family/test_modeling_$family.py")
done

run() { # which of the two runs, then pytest's arguments
  # Failures are for the comparison to judge; a run that broke leaves no results for it.
  (cd "$tree" && SUITE_ACCELERATED=${1#plain} SUITE_RESULTS="$work/$1.json" \
    "$python" -m pytest -q -p transformers_suite -p no:cacheprovider --tb=line "${@:2}") || true
}
compare() { "$python" tests/transformers_suite.py "$work"/{plain.json,accelerated.json,lost}; }

run plain "${files[@]}" "$@" >"$work/plain.log" 2>&1
run accelerated "${files[@]}" "$@" >"$work/accelerated.log" 2>&1
if ! compare; then
  [[ -s $work/lost ]] || { tail -n 20 "$work"/*.log && exit 1; }
  mapfile -t lost <"$work/lost"
  echo "again"
  run plain "${lost[@]}" >"$work/plain.log" 2>&1
  run accelerated "${lost[@]}" --tb=short >"$work/accelerated.log" 2>&1
  compare || { cat "$work/accelerated.log" && exit 1; }
fi
