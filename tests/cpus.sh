#!/usr/bin/env bash
# Runs the tests with the instruction sets and thread counts of other CPUs and prints one line per environment.
#
#   tests/cpus.sh                      same as `make test-cpus`; about half an hour on two cores
#   tests/cpus.sh -m slow -k topology  runs other tests: all arguments are passed to pytest
#
# A test that fails in only some environments compares numbers that depend on the CPU, such as the rounding error of a
# gradient whose true value is zero, which Adam amplifies. Do not widen its tolerance. Compare in float64 instead, or
# train a network whose output layer is not initialized to zero (`TINY_TRAINED_CONFIG` in helpers.py).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

# Instruction sets of torch's own kernels, of oneDNN (convolutions) and of MKL (matrix products), and thread counts.
# Together they cover every value and the usual pairs. Unset variables mean the CPU's own capabilities.
environments=(
    "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1"
    "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2 OMP_NUM_THREADS=1"
    "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX512_CORE OMP_NUM_THREADS=2"
    "ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE OMP_NUM_THREADS=1"
    "OMP_NUM_THREADS=2"
)
# All tests except the files without tensor arithmetic, so that new tests are included by default.
tests=(tests --ignore=tests/test_{data,distributed,multi_node,strangers}.py)
if (($# > 0)); then tests=("$@"); fi

case $("$python" -c 'import torch; print(torch.backends.cpu.get_cpu_capability())') in
AVX512) capabilities=(default avx2 avx512) ;;
AVX2) capabilities=(default avx2) ;;
*) capabilities=(default) ;;
esac
log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0
for environment in "${environments[@]}"; do
    # torch crashes with an illegal instruction if the CPU lacks the requested capability.
    if [[ $environment =~ ATEN_CPU_CAPABILITY=([a-z0-9]+) && " ${capabilities[*]} " != *" ${BASH_REMATCH[1]} "* ]]; then
        echo "$environment: skipped, this CPU has ${capabilities[*]}"
        continue
    fi
    env $environment "$python" -m pytest -q "${tests[@]}" >"$log" 2>&1 || {
        failed=1
        cat "$log"
    }
    echo "$environment: $(tail -n 1 "$log")"
done
exit $failed
