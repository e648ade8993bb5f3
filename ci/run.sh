#!/usr/bin/env bash
# All tests, on a bare machine: gcc and clang builds with warnings as errors, unit and conformance tests, cases, faults, random cases, ASan+UBSan
# and TSan runs, header and layer checks, bad input. Ends with "N passed, N failed, N skipped".
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
passed=0 failed=0 skipped=0
log=$(mktemp -d)
trap 'rm -rf "$log"' EXIT

# run NAME COMMAND...: one line a check, the log only when it fails.
run() {
    local name=$1 start=$SECONDS
    shift
    if "$@" >"$log/out" 2>&1; then
        passed=$((passed + 1))
        printf 'ok    %-44s %3d s  %s\n' "$name" $((SECONDS - start)) "$(tail -n 1 "$log/out" | cut -c 1-110)"
    else
        failed=$((failed + 1))
        printf 'FAIL  %-44s %3d s\n' "$name" $((SECONDS - start))
        tail -n 60 "$log/out" | sed 's/^/      /'
    fi
}

build() { # PRESET [cmake arguments]
    local preset=$1
    shift
    cmake --preset "$preset" -DXP_WERROR=ON "$@" && cmake --build --preset "$preset"
}

# ctest_run PRESET [LABEL]: each test counts as one.
ctest_run() {
    local preset=$1 start=$SECONDS
    shift
    ctest --test-dir "build/$preset" -j 2 --output-on-failure --no-tests=error "$@" >"$log/ctest" 2>&1
    local ok bad skip
    ok=$(grep -c ' Passed ' "$log/ctest")
    bad=$(grep -cE '\*\*\*(Failed|Timeout|Exception|Not Run)' "$log/ctest")
    skip=$(grep -c '\*\*\*Skipped' "$log/ctest")
    passed=$((passed + ok)) failed=$((failed + bad)) skipped=$((skipped + skip))
    printf '%-5s %-44s %3d s  %d passed, %d failed, %d skipped\n' "$([ "$bad" -eq 0 ] && [ "$ok" -gt 0 ] && echo ok || echo FAIL)" \
        "ctest $preset $*" $((SECONDS - start)) "$ok" "$bad" "$skip"
    [ "$ok" -gt 0 ] || failed=$((failed + 1))
    [ "$bad" -eq 0 ] || sed 's/^/      /' "$log/ctest" | tail -n 120
}

run "setup" bash ci/setup.sh
run "build gcc release" build release
run "build clang" build clang
run "build asan+ubsan" build asan
run "build tsan" build tsan
run "build fuzz targets" build fuzz
run "headers alone" bash ci/checks/headers.sh
run "layers" bash ci/checks/layers.sh
run "format" bash ci/checks/format.sh

ctest_run release
ctest_run clang
run "cases" build/release/expar check -q
run "500 random cases" build/release/expar check --random 500 --seed 1 -q
run "golden vectors" build/release/expar verify golden
run "dialects told apart" build/release/expar selftest dialects
run "relations" build/release/expar selftest relations
run "relations of the second formulation" build/release/expar selftest relations --impl dense
run "step equality" bash tests/steps.sh build/release/expar .
run "a model, shrunk" build/release/expar check --model qwen1.5-moe-a2.7b --shrink 16 --layers 2 --tokens 96 --text golden/text/us-declaration.txt --mesh sim:fsdp=6,ep=3
run "faults" bash tests/faults.sh build/release/expar
run "asan: smoke cases" build/asan/expar check 'smoke*' -q
ctest_run asan
run "tsan: smoke cases" build/tsan/expar check 'smoke*' -q
ctest_run tsan -L conform
run "fuzz targets, 5 s each" bash tests/fuzz.sh build/fuzz 5

printf '%d passed, %d failed, %d skipped\n' $passed $failed $skipped
[ $failed -eq 0 ] && [ $passed -gt 0 ]
