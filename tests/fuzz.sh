#!/usr/bin/env bash
# Runs the fuzz targets of a build made with XP_FUZZ, each for some seconds, from the committed seeds:
#   tests/fuzz.sh BUILD SECONDS [TARGET...]
# One line a target; what breaks one is kept in BUILD/fuzz-found. FUZZ_SEED=N takes another walk than the first.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
build=${1:?a build folder} seconds=${2:?seconds a target}
shift 2
found=$build/fuzz-found
log=$(mktemp -d)
trap 'rm -rf "$log"' EXIT
mkdir -p "$found"
[ $# -gt 0 ] || set -- $(cd "$here/fuzz/seeds" && echo *)

# fuzz TARGET: leaves its output in $log/TARGET and "ok" or "bad" in $log/TARGET.end.
fuzz() {
    local name=$1 more=()
    [ "$name" = config ] && more=("$here/../golden/models")
    [ -f "$here/fuzz/dict/$name.txt" ] && more+=("-dict=$here/fuzz/dict/$name.txt")
    mkdir -p "$log/corpus.$name"
    if "$build/fuzz_$name" -max_total_time="$seconds" -seed="${FUZZ_SEED:-1}" -timeout=10 -rss_limit_mb=2048 -max_len=8192 \
        -print_final_stats=1 -artifact_prefix="$found/$name-" "$log/corpus.$name" "$here/fuzz/seeds/$name" "${more[@]}" >"$log/$name" 2>&1 &&
        grep -q '^Done [1-9]' "$log/$name"; then
        echo ok >"$log/$name.end"
    else
        echo bad >"$log/$name.end"
    fi
}

# As many at a time as there are processors.
free=$(nproc 2>/dev/null || echo 1)
for name; do
    [ "$free" -gt 0 ] || { wait -n; free=$((free + 1)); }
    fuzz "$name" &
    free=$((free - 1))
done
wait

bad=0 targets=0 total=0
for name; do
    targets=$((targets + 1))
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log/$name")
    total=$((total + ${runs:-0}))
    if [ "$(cat "$log/$name.end" 2>/dev/null)" = ok ]; then
        echo "ok    $name: $runs inputs"
    else
        bad=$((bad + 1))
        echo "FAIL  $name"
        grep -E -m 3 'not so: |runtime error: |ERROR: |Sanitizer: ' "$log/$name" | sed 's/^/      /'
        grep -v '^#[0-9]' "$log/$name" | tail -n 40 | sed 's/^/      | /'
    fi
done
echo "fuzz: $targets targets, $total inputs, $bad failed"
[ "$targets" -gt 0 ] && [ "$bad" -eq 0 ]
