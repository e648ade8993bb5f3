#!/usr/bin/env bash
# Proves that each fault of `expar list faults` is caught by the cases of smoke.txt and faults.txt: exit code 1, every
# block naming the fault's stage and a rank, one the class that the catalogue promises; that without a fault they pass;
# that a fault is silent where its mistake changes nothing, or is what the case declares; that what programs take silently
# is refused; and that the dtypes and divisors of a case line reach the stages. Prints one line a fault.
set -u
expar=$1
bad=0 n=0
out=$(mktemp)
trap 'rm -rf "$out" "$out.d"' EXIT

if ! "$expar" check 'smoke*' 'faults*' -q >"$out" 2>&1; then
    echo "faults: the cases fail without a fault"
    cat "$out"
    exit 1
fi
while read -r fault; do
    n=$((n + 1))
    stage=$("$expar" explain "$fault" | sed -n 's/^stage  *//p')
    class=$("$expar" explain "$fault" | sed -n 's/^caught by  *//p')
    "$expar" check 'smoke*' 'faults*' -q --fault "$fault" >"$out" 2>&1
    code=$?
    # The block of a failed case names stage, class and place.
    if [ $code -ne 1 ]; then
        echo "MISSED  $fault: exit code $code, expected 1"
        bad=1
    elif grep -E '^  stage ' "$out" | grep -qvE "^  stage +$stage\b" || ! grep -qE '^  where +rank [0-9]+' "$out" ||
        ! grep -qE "^  class +$class:" "$out"; then
        echo "UNNAMED $fault: expected stage $stage, a rank and class $class in:"
        grep -vE '^PASS' "$out" | head -n 20
        bad=1
    else
        cases=$(grep -cE '^(FAIL|ERROR|VACUOUS)' "$out")
        echo "caught  $fault: $stage, class $class, in $cases cases"
    fi
done < <("$expar" list faults | awk 'NR > 1 { print $1 }')
[ $n -ge 37 ] || { echo "faults: only $n in the list"; bad=1; }
echo "faults: $n in the catalogue"

# Where nothing is wrong, nothing is reported.
while read -r fault line; do
    if "$expar" check "$line" -q --fault "$fault" >"$out" 2>&1; then
        echo "silent  $fault: $line"
    else
        echo "REPORTED $fault, which changes nothing in: $line"
        cat "$out"
        bad=1
    fi
done <<'END'
grad-times-ep layer T=24 E=8 K=2 H=16 F=12 mesh=sim:fsdp=2
grad-undivided layer T=24 E=8 K=2 H=16 F=12 mesh=sim:fsdp=4,ep=2
grad-unreduced layer T=24 E=8 K=2 H=16 F=12
experts-unreduced step T=24 E=8 K=2 H=16 F=12 mesh=sim:ep=2
skip-empty layer T=64 E=4 K=2 H=16 F=12 mesh=sim:fsdp=4,ep=2
norm-replicas gradnorm N=501 with=place mesh=sim:fsdp=1
norm-averaged gradnorm N=501 mesh=sim:fsdp=1
norm-group gradnorm N=501 with=place Q=12 mesh=sim:fsdp=2,ep=2
norm-local-experts gradnorm N=501 with=place Q=12 mesh=sim:dp=2,fsdp=2
norm-outsiders gradnorm N=501 with=place Q=5 mesh=sim:fsdp=3
norm-empty-leaves gradnorm N=501 mesh=sim:fsdp=3
nan-unclipped clip N=300 data=extreme nonfinite=skip,propagate seed=2,3
stale-counts step T=24 E=8 K=2 H=16 F=12 mesh=sim:ep=4
empty-leaves layer T=64 E=4 K=2 H=16 F=12 mesh=sim:fsdp=4,ep=2
replay-softmax route T=33 E=11 K=3 dialect=hf-5.24/deepseek_v3 n_group=1 topk_group=1
outside-undivided scatter G=1 R=7 N=5 divisor=7 mesh=sim:fsdp=3
combine-bf16 layer T=24 E=12 K=4 H=16 F=12 dtype=bf16 dialect=hf-5.24/mixtral accumulate=eager_act
weight-bf16 layer T=24 E=12 K=4 H=16 F=12 dtype=bf16 dialect=hf-5.24/mixtral weight_dtype=act
dx-running layer T=24 E=12 K=4 H=16 F=12 dtype=bf16 dialect=hf-5.24/mixtral dx_sum=act
END

# No count of tokens and no number of ranks stands for another one.
refused() {
    "$expar" check "$1" >"$out" 2>&1
    code=$?
    if [ $code -eq 2 ] && grep -qF "$2" "$out"; then
        echo "refused $1"
    else
        echo "TAKEN   $1: exit code $code, expected 2 and '$2'"
        cat "$out"
        bad=1
    fi
}
refused 'scatter R=7 N=5 divisor=0 mesh=sim:fsdp=3' 'divisor is 0, expected > 0'
refused 'step T=0 mesh=sim:fsdp=2' 'tokens: 0, expected 1'
refused 'step mesh=sim:dp=0,fsdp=2' "dp: '0'"

same() {
    if [ "$2" = "$3" ]; then
        echo "reaches $1"
    else
        echo "IGNORED $1: $2, expected $3"
        bad=1
    fi
}
# dtype CALL TENSOR KEYS: as a written call of a layer with those keys has it.
dtype() {
    rm -rf "$out.d"
    "$expar" check "layer T=24 E=8 K=2 H=16 F=12 S=10 act=bf16 $3" -q --dump "$out.d" >/dev/null 2>&1
    grep -aohE "\"in\.$2\":\{[^}]*\}" "$out.d"/data/"$1"-[0-9]*.prompt.safetensors | sed -n 's/.*"dtype":"\([A-Z0-9]*\)".*/\1/p;q'
}
# With a fault, the report of a layer shows the bound (its exponent) and the factor that the gradient is off by.
bits() {
    "$expar" check "layer T=24 E=8 K=2 H=16 F=12 mesh=sim:fsdp=2 ${2-}" -q --fault "$1" |
        sed -n 's/.* bound 0x.*p-\([0-9]*\)$/\1/p' | head -n 1
}
factor() {
    "$expar" check "layer T=24 E=8 K=2 H=16 F=12 mesh=sim:fsdp=2 ${1-}" -q --fault outside-undivided |
        sed -n 's/.*got = \([0-9]*\) x expected.*/\1/p' | head -n 1
}
same gate=f32 "$(dtype router w gate=f32) $(dtype shared w1 gate=f32) $(dtype expert w1 gate=f32)" "F32 BF16 BF16"
same shared=f16 "$(dtype router w shared=f16) $(dtype shared w1 shared=f16) $(dtype expert w1 shared=f16)" "BF16 F16 BF16"
same param=f32 "$(dtype router w param=f32) $(dtype shared w1 param=f32) $(dtype expert w1 param=f32)" "F32 F32 F32"
same expert_reduce=bf16 "$((($(bits experts-unreduced) - $(bits experts-unreduced expert_reduce=bf16)) / 8)) $(bits outside-undivided expert_reduce=bf16)" \
    "1 $(bits outside-undivided)"
same reduce=bf16 "$((($(bits outside-undivided) - $(bits outside-undivided reduce=bf16)) / 8)) $(bits experts-unreduced 'reduce=bf16 expert_reduce=f32')" \
    "1 $(bits experts-unreduced)"
same divide=world "$(factor) $(factor divide=world)" "24 12"
exit $bad
