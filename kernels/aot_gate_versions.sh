#!/usr/bin/env bash
# The ahead-of-time gate with the oldest and the newest supported Triton, each in a fresh virtual
# environment. Arguments are the gate's: kernels/aot_gate_versions.sh --markdown
set -euo pipefail
gate="$(cd "$(dirname "$0")" && pwd)/aot_gate.py"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
unset TRITON_INTERPRET

failed=0
for version in 3.6.0 3.9.0; do
    printf '\nTriton %s\n\n' "$version"
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet torch==2.13.0
    # PyTorch may pin another Triton, and the kernels do not depend on its pin. Triton 3.6's
    # interpreter does not know NumPy 2.4; the bound keeps the environment usable for the tests.
    "$work/$version/bin/pip" install --quiet --no-deps "triton==$version" "numpy<2.4"
    PYTHONPATH="$(dirname "$gate")" TRITON_CACHE_DIR="$work/cache-$version" \
        "$work/$version/bin/python" "$gate" "$@" || failed=1
done
exit "$failed"
