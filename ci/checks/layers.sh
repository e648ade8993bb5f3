#!/usr/bin/env bash
# Who may include whom: ref/, ref/dense/, ref/cpu/ and gpu/ see xp/*.h and their own folder; nobody includes them; a contract header
# sees only contract headers. ref/ and ref/dense/ call nothing of libm that is not correctly rounded (dense may).
set -u
cd "$(dirname "$0")/../.." || exit 1
bad=0

# quoted_includes FILE: the quoted includes of a file.
quoted_includes() { sed -n 's/^[[:space:]]*#[[:space:]]*include[[:space:]]*"\([^"]*\)".*/\1/p' "$1"; }

for folder in ref ref/dense ref/cpu gpu; do
    for file in "$folder"/*.[ch] "$folder"/*.cu "$folder"/*.cuh; do
        [ -f "$file" ] || continue
        for inc in $(quoted_includes "$file"); do
            case $inc in
            xp/*) [ -f "harness/$inc" ] && continue ;;
            */*) ;;
            *) [ -f "$folder/$inc" ] && continue ;;
            esac
            echo "layers: $file includes \"$inc\", which is neither xp/*.h nor its own folder's"
            bad=1
        done
    done
done
for file in harness/*.[ch] harness/xp/*.h; do
    for inc in $(quoted_includes "$file"); do
        case $file in
        harness/xp/*) [ -f "harness/xp/$inc" ] && continue ;;
        *) [ -f "harness/$inc" ] && continue ;;
        esac
        echo "layers: $file includes \"$inc\", which is not the harness's"
        bad=1
    done
done
for file in ref/*.c; do
    if grep -nE '\b(exp|exp2|expm1|log|log2|log10|log1p|pow|sin|cos|tanh|erf|erfc|cbrt|expf|logf|powf|tanhf|fma|fmaf)\(' "$file" |
        grep -vE '^[0-9]+:[[:space:]]*(\*|/\*|//)' | grep -v 'xp_ref_'; then
        echo "layers: $file calls a libm function whose bits differ between hosts"
        bad=1
    fi
    if grep -nE '\b(malloc|calloc|realloc|free|pthread_[a-z_]+|fork|exit|abort|printf)\(' "$file" | grep -v '^ref/backend.c' >/dev/null &&
        [ "$file" != ref/backend.c ]; then
        echo "layers: $file allocates, prints, exits or starts threads"
        bad=1
    fi
done
[ -n "$(ls ref/*.c)" ] || bad=1
echo "layers: checked"
exit $bad
