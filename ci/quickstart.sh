#!/usr/bin/env bash
# The main job on a fresh machine: install, build, then on real text (a) check one full-width MoE layer of Qwen3-30B-A3B, (b) train a narrow
# model of the same routing shape on three meshes that must end in the same bits, (c) switch a real bug on and see it caught.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
[ -t 1 ] || say() { printf '\n== %s\n' "$*"; }

bash ci/setup.sh
cmake --preset release >build.log 2>&1 && cmake --build --preset release >>build.log 2>&1 || { cat build.log; exit 1; }
rm -f build.log
expar=build/release/expar
text=golden/text/us-constitution.txt
started=$(date +%s)

say "(a) one full-width Qwen3-30B-A3B MoE layer, forward and backward, on sim:fsdp=8,ep=8: each stage against a second formulation, each row against one rank"
$expar check --model qwen3-30b-a3b --layers 1 --tokens 256 --text $text --mesh sim:fsdp=8,ep=8

say "(b) 20 training steps of a narrow model of the same routing shape on three meshes: the loss falls, and the parameters end equal to the last bit"
digests= out=$(mktemp)
trap 'rm -f "$out"' EXIT
for mesh in sim:fsdp=1 sim:fsdp=6,ep=2 sim:dp=2,fsdp=4,ep=4; do
    $expar step --model qwen3-30b-a3b --shrink 16 --layers 2 --tokens 512 --steps 20 --deterministic --text $text --mesh $mesh | tee "$out"
    digests+="$(sed -n 's/^parameters sha256 //p' "$out") "
    first=$(awk '$1 == 1 { print $2 }' "$out")
    last=$(awk '$1 == 20 { print $2 }' "$out")
    awk -v a="$first" -v b="$last" 'BEGIN { exit !(b < a) }' || { echo "the loss did not fall: $first to $last"; exit 1; }
done
set -- $digests
[ $# -eq 3 ] && [ "$1" = "$2" ] && [ "$1" = "$3" ] || { echo "the parameters differ: $digests"; exit 1; }
echo "parameters after 20 steps, on all three meshes: sha256 $1"

say "(c) a real bug, switched on: expert gradients ep times too large (pytorch#160285). AdamW trains on; the judge names it"
line='layer T=64 E=8 K=2 H=32 F=24 dtype=bf16 mesh=sim:fsdp=4,ep=4'
if $expar check "$line" --fault grad-times-ep; then
    echo "the fault was not caught"
    exit 1
fi
say "done in $(($(date +%s) - started)) s"
