#!/usr/bin/env bash
# What only a machine with a GPU can show: the kernel tests compiled, the doctor, memory checks where the tool is
# installed, and timings. Each step's output is kept as it comes, in the folder named by the first argument
# (gpu-check/ by default); a failed step does not stop the next, but fails the whole.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-gpu-check}
mkdir -p "$results"
unset TRITON_INTERPRET
failed=0

step() {
    local name=$1
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$results/$name.txt" || { failed=1; echo "== $name FAILED"; }
}

step machine python -c 'import torch, triton
assert torch.cuda.is_available(), "no CUDA or ROCm device"
print(torch.__version__, triton.__version__, torch.cuda.get_device_name())'
[ "$failed" = 0 ] || exit 1
step doctor python -m sure_kernels
step tests python -m pytest tests/kernels -p no:cacheprovider
if command -v compute-sanitizer >/dev/null; then
    # Caching would hide accesses outside an allocation that lie inside torch's pool.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step memcheck compute-sanitizer --tool memcheck --error-exitcode 1 \
        python -m pytest tests/kernels -p no:cacheprovider -k "shapes or layouts or classes"
fi
# Timings of kernels that are wrong are worth nothing.
if [ "$failed" = 0 ]; then
    step benchmarks python -m benchmarks --device cuda --out "$results/benchmarks.json"
fi
exit "$failed"
