#!/usr/bin/env bash
# One wheel, several torches and Pythons: builds it once, then installs and runs it under each pair whose
# interpreter is found. Pairs are "python torch-requirement", one per line in $PAIRS.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
PAIRS=${PAIRS:-"3.12 torch==2.11.0
3.13 torch"}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

find_python() {  # an interpreter of version $1: on PATH, or one that pyenv keeps
  local candidate
  for candidate in "$(command -v "python$1" || true)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
    if [ -x "$candidate" ] && "$candidate" -c 'import venv' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}

"$python" -m pip wheel -q --no-deps --no-build-isolation -w "$work/wheel" .
wheel=$(ls "$work"/wheel/*.whl)
case $wheel in *cp310-abi3-*) ;; *) echo "not a cp310-abi3 wheel: $wheel" >&2; exit 1 ;; esac
"$python" -c 'import sys, torch; print("built under Python", sys.version.split()[0], "and torch", torch.__version__)'

check() { # the wheel under interpreter $1 and a torch that meets $2, in folder $3
  "$1" -m venv "$3"
  # Bytecode only of what is imported.
  "$3/bin/pip" install -q --no-cache-dir --no-compile "$2" "$wheel"
  (cd "$work" && "$3/bin/python" "$OLDPWD/tests/portability_smoke.py")
}

# All at once: one waits for the network while another unpacks.
running=() names=()
while read -r version requirement; do
  interpreter=$(find_python "$version")
  if [ -z "$interpreter" ]; then
    echo "skipped: no Python $version on this machine"
    continue
  fi
  check "$interpreter" "$requirement" "$work/${#running[@]}" &
  running+=($!) names+=("Python $version with $requirement")
done <<<"$PAIRS"
status=0
for i in "${!running[@]}"; do
  wait "${running[i]}" || { status=$? && echo "failed: ${names[i]}" >&2; }
done
[ $status = 0 ] && echo "${#running[@]} further pairs of Python and torch ran the same binary"
exit $status
