#!/usr/bin/env bash
# What only a machine with a GPU can show, in under nine minutes: the doctor, the kernel tests compiled, memory checks
# where the tool is installed, timings, and a profile of the slowest kernel case. Each step's output is kept as it comes,
# in the folder named by the first argument (gpu-check/ by default); a failed step does not stop the next, but fails the
# whole. Steps that the time does not reach are named. Only torch, triton, numpy and pytest have to be installed.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-gpu-check}
mkdir -p "$results"
unset TRITON_INTERPRET
failed=0
deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-520}))

# step NAME SECONDS COMMAND...: at most so long, and never beyond the deadline.
step() {
    local name=$1 most=$2 left=$((deadline - SECONDS))
    shift 2
    if [ "$left" -lt 15 ]; then
        echo "== $name: no time left" | tee -a "$results/summary.txt"
        failed=1
        return
    fi
    [ "$most" -lt "$left" ] || most=$left
    echo "== $name: $*"
    local began=$SECONDS outcome=ok
    timeout "$most" "$@" 2>&1 | tee "$results/$name.txt" || { failed=1; outcome=FAILED; }
    echo "== $name: $outcome, $((SECONDS - began)) s" | tee -a "$results/summary.txt"
}

: >"$results/summary.txt"
step machine 60 python -c 'import torch, triton
assert torch.cuda.is_available(), "no CUDA or ROCm device"
print(torch.__version__, triton.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_properties(0))'
[ "$failed" = 0 ] || exit 1
step doctor 90 python -m sure_kernels
step tests 200 python -m pytest tests/kernels -p no:cacheprovider --ignore=tests/kernels/test_compile_check.py
if command -v compute-sanitizer >/dev/null; then
    # Caching would hide accesses outside an allocation that lie inside torch's pool.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 1 \
        python -m pytest tests/kernels -p no:cacheprovider -k "shapes or layouts or classes" -x
fi
# Timings of kernels that are wrong are worth nothing.
if [ "$failed" = 0 ]; then
    step benchmarks 220 python -m benchmarks run --device cuda --budget 180 --out "$results/benchmarks.json"
    step profile 60 python -m benchmarks profile --device cuda --out "$results/trace.json"
fi
cat "$results/summary.txt"
exit "$failed"
