#!/usr/bin/env bash
# Deterministic training gives the same parameters, to the last bit, on every mesh; and a mistake that only the sum over ranks makes is seen by it.
# Prints one line a mesh.
set -u
expar=$1
text=$2/golden/text/us-declaration.txt
bad=0 n=0
out=$(mktemp)
trap 'rm -f "$out"' EXIT

# digest MESH [options]: trains and leaves the digest in $digest.
digest() {
    local mesh=$1
    shift
    digest=none
    if "$expar" step --deterministic --steps 3 --text "$text" --mesh "$mesh" "$@" >"$out" 2>&1; then
        digest=$(sed -n 's/^parameters sha256 //p' "$out")
    else
        cat "$out"
    fi
}

# same MODEL-OPTIONS -- MESH...: all meshes end with the first one's parameters.
same() {
    local options=() first=
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    for mesh in "$@"; do
        n=$((n + 1))
        digest "$mesh" "${options[@]}"
        first=${first:-$digest}
        if [ "$digest" = "$first" ] && [ ${#digest} -eq 64 ]; then
            echo "same    $mesh ${options[1]} ${digest:0:16}"
        else
            echo "DIFFERS $mesh ${options[*]}: $digest, expected $first"
            bad=1
        fi
    done
}

same --model qwen3-30b-a3b --shrink 64 --layers 2 --tokens 100 -- sim:fsdp=1 sim:fsdp=2,ep=2 sim:fsdp=3 sim:dp=2,fsdp=2,ep=4 sim:fsdp=6,ep=2 \
    sim:fsdp=7 sim:dp=2,fsdp=4,ep=4,jitter=5 sim:fsdp=8,ep=2,ep_fsdp=2 sim:dp=8,ep=8
same --model qwen1.5-moe-a2.7b --shrink 64 --layers 1 --tokens 70 -- sim:fsdp=1 sim:fsdp=3,ep=3 sim:dp=3,fsdp=2,ep=2,ep_fsdp=1 sim:fsdp=5,ep=5 sim:fsdp=8,ep=4
same --model mixtral-8x7b --shrink 128 --layers 1 --tokens 33 -- sim:fsdp=1 sim:fsdp=4,ep=4 sim:fsdp=6,ep=2

# The check can fail: unsummed gradients change the parameters on a mesh, and nothing on one rank.
options=(--model mixtral-8x7b --shrink 128 --layers 1 --tokens 33)
digest sim:fsdp=1 "${options[@]}"
right=$digest
digest sim:fsdp=4,ep=4 "${options[@]}" --fault grad-unreduced
if [ "$digest" = "$right" ] || [ "$digest" = none ]; then
    echo "MISSED  gradients that are not summed leave the digest $digest"
    bad=1
fi
[ $n -ge 15 ] || bad=1

# fits MODEL MESH: what lives at once of each kind of memory is no more than the plan said.
fits() {
    local over
    "$expar" step --model "$1" --layers 3 --shrink 16 --experts 16 --tokens 512 --mesh "$2" --steps 1 >"$out" 2>&1
    over=$(grep -oE '(param|grad|optim|act) [0-9]+ \([0-9]+\)' "$out" | tr -d '()' | awk '{ seen++ } $2 > $3 { print } END { if (seen != 4) print "no plan" }')
    if [ -z "$over" ]; then
        echo "fits    $2 $1"
    else
        echo "ABOVE   $2 $1: measured and planned KiB: $over"
        bad=1
    fi
}
fits llama-4-scout sim:fsdp=1
fits gemma-4-26b-a4b sim:fsdp=1
fits gemma-4-26b-a4b sim:fsdp=4,ep=2
fits qwen3-30b-a3b sim:dp=2,fsdp=2,ep=4
echo "steps: $n runs of three deterministic steps"
exit $bad
