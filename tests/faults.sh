#!/usr/bin/env bash
# Proves that each fault of `expar list faults` is caught by the smoke cases: exit code 1, naming the stage, a rank and the class that the
# catalogue promises; and that without a fault they pass. Prints one line a fault.
set -u
expar=$1
bad=0 n=0
out=$(mktemp)
trap 'rm -f "$out"' EXIT

if ! "$expar" check 'smoke*' -q >"$out" 2>&1; then
    echo "faults: the smoke cases fail without a fault"
    cat "$out"
    exit 1
fi
while read -r fault; do
    n=$((n + 1))
    stage=$("$expar" explain "$fault" | sed -n 's/^stage  *//p')
    class=$("$expar" explain "$fault" | sed -n 's/^caught by  *//p')
    "$expar" check 'smoke*' -q --fault "$fault" >"$out" 2>&1
    code=$?
    # The block of a failed case names stage, class and place.
    if [ $code -ne 1 ]; then
        echo "MISSED  $fault: exit code $code, expected 1"
        bad=1
    elif ! grep -qE "\b$stage\b" "$out" || ! grep -qE "\brank [0-9]+" "$out" || ! grep -qiE "\b$class\b" "$out"; then
        echo "UNNAMED $fault: expected stage $stage, a rank and class $class in:"
        grep -vE '^PASS' "$out" | head -n 20
        bad=1
    else
        cases=$(grep -cE '^(FAIL|ERROR|VACUOUS)' "$out")
        echo "caught  $fault: $stage, class $class, in $cases cases"
    fi
done < <("$expar" list faults | awk 'NR > 1 { print $1 }')
[ $n -ge 16 ] || { echo "faults: only $n in the list"; bad=1; }
echo "faults: $n in the catalogue"
exit $bad
