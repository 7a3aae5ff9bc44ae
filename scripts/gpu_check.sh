#!/usr/bin/env bash
# What only a machine with a GPU can show, in under nine minutes: the doctor, the kernel tests compiled, large volumes,
# memory checks where the tool is installed, timings, and a profile of the slowest kernel case. Each step's output is
# kept as it comes in benchmarks/results/MACHINE/ (or the folder named by the first argument), timings in MACHINE.json
# beside it; a failed step does not stop the next, but fails the whole. Steps that the time does not reach are named.
# Only torch, triton, numpy and pytest have to be installed. PYTHON names the interpreter: by default that of .venv, or
# python3 where there is none. Without a GPU: one line, exit status 2.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
unset TRITON_INTERPRET
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi
if ! command -v "$PYTHON" >/dev/null; then
    echo "gpu-check: PYTHON: expected a Python interpreter, got $PYTHON" >&2
    exit 2
fi
machine=$("$PYTHON" -W ignore -c '
import sys

try:
    import numpy, pytest, torch, triton

    if not torch.cuda.is_available():
        raise OSError(f"torch {torch.__version__} finds no CUDA or ROCm device")
    from benchmarks.results import default_path

    print(default_path(torch.device("cuda")).stem)
except Exception as error:
    sys.exit(f"gpu-check: {error} ({sys.executable}; PYTHON=... takes another)")
') || exit 2

results=${1:-benchmarks/results/$machine}
results=${results%/}
summary=$results/summary.txt
mkdir -p "$results"
failed=0
deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-520}))
{
    echo "$machine, $(date -u +%FT%TZ), commit ${BENCHMARKS_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}"
    [ -z "$(git status --porcelain --untracked-files=no 2>/dev/null)" ] || echo "the tree has changes that no commit holds"
} | tee "$summary"

# left NAME MOST: seconds for a step, at most MOST and never beyond the deadline; fails where they are too few.
left() {
    local seconds=$((deadline - SECONDS))
    if [ "$seconds" -lt 15 ]; then
        echo "== $1: no time left" >>"$summary"
        return 1
    fi
    echo $((seconds < $2 ? seconds : $2))
}

# step NAME MOST COMMAND...: SIGINT, so that pytest still prints what it found.
step() {
    local name=$1 most began=$SECONDS outcome=ok status
    most=$(left "$name" "$2") || { failed=1; return 1; }
    shift 2
    echo "== $name: $*"
    # No pipe: what a killed command leaves running would hold it open.
    timeout -s INT -k 10 "$most" "$@" >"$results/$name.txt" 2>&1
    status=$?
    tail -n 20 "$results/$name.txt"
    case $status in
        0) ;;
        124 | 137) outcome="FAILED: not done in $most s" ;;
        *) outcome="FAILED: status $status" ;;
    esac
    echo "== $name: $outcome, $((SECONDS - began)) s" | tee -a "$summary"
    [ "$outcome" = ok ] || { failed=1; return 1; }
}

# Every file of kernel tests in a process of its own: what takes long is compiling, on one core a process.
kernel_tests() {
    local most file name status outcome began=$SECONDS all=0 names=()
    local -A running=()
    most=$(left tests "$1") || { failed=1; return 1; }
    echo "== tests: tests/kernels, each file by itself, output in $results"
    # Job control: what the shell starts in the background would otherwise ignore SIGINT.
    set -m
    for file in tests/kernels/test_*_kernel.py; do
        name=$(basename "$file" .py)
        [ "$name" != test_gpu_kernel ] || continue
        OMP_NUM_THREADS=1 timeout -s INT -k 10 "$most" "$PYTHON" -m pytest "$file" -p no:cacheprovider \
            -k "not offsets_past" >"$results/$name.txt" 2>&1 &
        running[$name]=$!
        names+=("$name")
    done
    set +m
    for name in "${names[@]}"; do
        wait "${running[$name]}"
        status=$?
        outcome=ok
        case $status in
            0) ;;
            5) outcome="nothing to run" ;; # hypothesis is not installed
            124 | 137) outcome="FAILED: not done in $most s" all=1 ;;
            *) outcome="FAILED: status $status" all=1 ;;
        esac
        echo "   $name: $outcome: $(tail -n 1 "$results/$name.txt")" | tee -a "$summary"
    done
    if [ "$all" = 0 ]; then outcome=ok; else outcome=FAILED failed=1; fi
    echo "== tests: $outcome, $((SECONDS - began)) s" | tee -a "$summary"
    return "$all"
}

step doctor 100 "$PYTHON" -m sure_kernels
right=1
kernel_tests 210 || right=0
# One after the other: they take the memory of a large GPU.
step large 110 "$PYTHON" -m pytest tests/kernels/test_*_kernel.py -p no:cacheprovider -rsP \
    -k "gpu_kernel or offsets_past" || right=0
if command -v compute-sanitizer >/dev/null; then
    # Caching would hide accesses outside an allocation that lie inside torch's pool.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step memcheck 50 compute-sanitizer --tool memcheck --error-exitcode 1 \
        "$PYTHON" -m pytest tests/kernels/test_*_kernel.py -p no:cacheprovider -x \
        -k "(shapes or layouts or classes) and not full_graph and not gpu_kernel"
else
    echo "== memcheck: not run, compute-sanitizer is not installed" | tee -a "$summary"
fi
if [ "$right" = 1 ]; then
    step benchmarks 150 "$PYTHON" -m benchmarks run --device cuda --budget 60 --out "$results.json"
    step profile 30 "$PYTHON" -m benchmarks profile --device cuda --out "$results/trace.json"
else
    echo "== benchmarks: not run, since timings of kernels that are wrong are worth nothing" | tee -a "$summary"
fi
echo
cat "$summary"
exit "$failed"
