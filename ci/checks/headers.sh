#!/usr/bin/env bash
# Every header of the contract compiles alone, as C11, C17 and C++17, without a warning. One line a failure.
set -u
cd "$(dirname "$0")/../.." || exit 1
bad=0 n=0
for header in harness/xp/*.h; do
    for as in "c c11" "c c17" "c++ c++17"; do
        set -- $as
        n=$((n + 1))
        for cc in gcc clang; do
            if ! $cc -x "$1" -std="$2" -Wall -Wextra -Wpedantic -Werror -fsyntax-only "$header"; then
                echo "headers: $header does not compile alone as $2 with $cc"
                bad=1
            fi
        done
    done
done
[ $n -gt 0 ] || bad=1
echo "headers: $n compilations with each of gcc and clang"
exit $bad
