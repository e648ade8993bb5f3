#!/usr/bin/env bash
# Vector sets from outside: the golden ones, damaged ones, right and wrong responses, sets that the program writes itself.
#   vectors.sh PROGRAM
set -u
expar=$(realpath "$1") source=$(realpath "$(dirname "$0")/..")
golden=$source/golden
passed=0 failed=0
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir" || exit 1
unset EXPAR_GOLDEN NO_COLOR

# check NAME CODE PATTERN COMMAND...: the exit code, and a line of the output or of the errors that matches PATTERN.
check() {
    local name=$1 code=$2 pattern=$3 got
    shift 3
    "$@" >out 2>&1 </dev/null
    got=$?
    if [ $got -eq "$code" ] && grep -qE -- "$pattern" out; then
        passed=$((passed + 1))
        echo "ok $((passed + failed)) $name"
    else
        failed=$((failed + 1))
        echo "not ok $((passed + failed)) $name: exit $got, expected $code with '$pattern': $(head -n 12 out | cut -c 1-300)"
    fi
}

# flip FILE BIT
flip() {
    local byte
    byte=$(od -An -tu1 -j $(($2 / 8)) -N 1 "$1" | tr -d ' ')
    printf "\\x$(printf %02x $((byte ^ (1 << ($2 % 8)))))" | dd of="$1" bs=1 seek=$(($2 / 8)) conv=notrunc status=none
}

# ---- what others answered
check "golden vectors" 0 '^PASS [0-9]+  FAIL 0  in 2 sets, [0-9]{7,} elements compared, [0-9]{5,} of them bit for bit' \
    "$expar" verify "$golden"
check "every test is counted" 0 "^PASS $(cat "$golden"/core/groups/*.json "$golden"/layer/groups/*.json | grep -c '"tcId"')  " \
    "$expar" verify "$golden"
check "a second formulation" 0 '^PASS 1 ' "$expar" verify --impl dense "$golden/layer"

# ---- one flipped bit
cp -r "$golden/layer" set
answer=set/data/moe-qwen2_moe-1.expected.safetensors prompt=set/data/moe-qwen2_moe-1.prompt.safetensors
bits=$(($(stat -c %s $answer) * 8))
for i in $(seq 0 39); do
    at=$(((i * 2654435761 + 977) % bits))
    flip $answer $at
    check "bit $at of an expected file" 1 "${answer##*/}: SHA-256 is [0-9a-f]{64}, expected " "$expar" verify set
    flip $answer $at
done
flip $answer $((bits - 2)) # an exponent of the last tensor
check "where it is" 1 '^  where  .*index \[' "$expar" verify set
flip $answer $((bits - 2))
flip $prompt 90000
check "a bit of a prompt" 1 "${prompt##*/}: SHA-256" "$expar" verify set
flip $prompt 90000
flip set/groups/moe-qwen2_moe.json 800
check "a bit of a group" 4 'moe-qwen2_moe.json: SHA-256' "$expar" verify set
flip set/groups/moe-qwen2_moe.json 800
truncate -s -1 $answer
check "a byte less" 1 'SHA-256' "$expar" verify set
rm $answer
check "a file that is not there" 4 "${answer##*/}" "$expar" verify set
check "no set" 4 'manifest.json' "$expar" verify "$dir/set/data"
check "no folder is named" 2 'no folder' "$expar" verify

# ---- somebody's answers
cp -r "$golden/layer/data" right
check "right responses" 0 '^PASS 1 ' "$expar" verify "$golden/layer" --responses right
check "gradients of experts x ep" 1 'known  grad-times-ep: .*exactly 4 x' "$expar" verify "$golden/layer" --responses "$golden/wrong/expert-grad-x-ep"
check "no shared expert" 1 'known  shared-missing' "$expar" verify "$golden/layer" --responses "$golden/wrong/missing-shared"
check "the wrong slot's weight" 1 'known  weight-slot' "$expar" verify "$golden/layer" --responses "$golden/wrong/weight-wrong-slot"
file=right/moe-qwen2_moe-1.expected.safetensors
LC_ALL=C sed 's/exp\.dsw1/exp.dswq/' "$golden/layer/data/${file##*/}" >$file
check "a misnamed tensor" 1 "exp.dswq" "$expar" verify "$golden/layer" --responses right
LC_ALL=C sed 's/"F32","shape":\[9,16\]/"F32","shape":[16,9]/' "$golden/layer/data/${file##*/}" >$file
check "another shape" 1 "exp\.(dx|y)" "$expar" verify "$golden/layer" --responses right
rm $file
check "no response" 1 "${file##*/}" "$expar" verify "$golden/layer" --responses right
check "responses that do not run" 2 '--impl' "$expar" verify "$golden/layer" --responses right --impl ref

# ---- sets of our own
check "a set of one stage" 0 'written' "$expar" gen 'rmsnorm T=5 H=12 dtype=bf16' one
check "is verified" 0 '^PASS 1 ' "$expar" verify one
check "and answers itself" 0 '^PASS 1 ' "$expar" verify one --responses one/data
check "is not written over" 2 "'one' holds a set already" "$expar" gen 'rmsnorm T=5 H=12 dtype=bf16' one
"$expar" gen 'rmsnorm T=5 H=12 dtype=bf16' two >/dev/null
check "has the same bytes again" 0 '^same$' sh -c 'diff -r one two && echo same'
check "a layer's stages" 0 'written' "$expar" gen 'layer T=32 H=16 F=8 E=8 K=2 dialect=hf-5.24/deepseek_v3 n_group=4 topk_group=2' layer
check "are verified" 0 '^PASS [0-9]{2} ' "$expar" verify layer
check "a step's dump" 0 '' "$expar" step --model mixtral-8x7b --shrink 64 --layers 1 --tokens 16 --steps 1 --dump step
check "is verified, too" 0 '^PASS [0-9]{2,} ' "$expar" verify step

# The balance losses see the router of the one layer that does not choose by a table, and of no other.
"$expar" step --model deepseek-v4-flash --shrink 64 --layers 4 --experts 8 --topk 2 --tokens 32 --steps 1 --dump mixed >/dev/null 2>&1
seen=$(od -An -v -tx1 mixed/data/balance-[0-9]*.prompt.safetensors | tr -d ' \n')
routers=$(ls mixed/data/router-[0-9]*.expected.safetensors | sort -t- -k2n) places=
for f in $routers; do
    bytes=$(tail -c 512 "$f" | od -An -v -tx1 | tr -d ' \n') # 32 tokens, 8 experts, bf16
    case $seen in *"$bytes"*) places=${places}y ;; *) places=${places}n ;; esac
done
check "the layers that the balance losses see" 0 '^nnny$' echo "$places"

# What lies between the maps of a latent width, forward and backward: the calls hand one another's tensors on.
"$expar" check -q 'layer T=16 E=4 K=2 H=10 F=6 D=8 S=5 dtype=f64 dialect=hf-5.24/nemotron_h' --dump latent >/dev/null 2>&1
calls=latent
# file KIND STAGE SITE: the prompt or the expected file of that call.
file() {
    grep -A6 "\"comment\": \".*, $3\"" "$calls/groups/$2.json" | sed -n "s/.*\"$1\": \"\(.*\)\",/\1/p"
}
# holds FROM BYTES IN [END]: y when the last BYTES of FROM, or those that begin END before its end, are somewhere in IN.
holds() {
    case $(od -An -v -tx1 "$calls/$3" | tr -d ' \n') in
        *"$(tail -c "${4:-$2}" "$calls/$1" | head -c "$2" | od -An -v -tx1 | tr -d ' \n')"*) printf y ;;
        *) printf n ;;
    esac
}
low=$((16 * 8 * 8)) high=$((16 * 10 * 8))
links=$(
    holds "$(file prompt router router)" $high "$(file prompt router 'latent down')"
    holds "$(file expected router 'latent down')" $low "$(file prompt permute permute)"
    holds "$(file expected combine combine)" $low "$(file prompt router 'latent up')"
    holds "$(file expected router 'latent up')" $high "$(file prompt residual 'residual shared')"
    holds "$(file expected combine combine)" $low "$(file prompt wgrad 'wgrad latent up')"
    holds "$(file expected router_bwd 'latent up')" $low "$(file prompt combine_bwd combine_bwd)"
    holds "$(file prompt router router)" $high "$(file prompt wgrad 'wgrad latent down')"
    holds "$(file expected permute_bwd permute_bwd)" $low "$(file prompt wgrad 'wgrad latent down')"
    holds "$(file expected permute_bwd permute_bwd)" $low "$(file prompt router_bwd 'latent down')"
    holds "$(file expected router_bwd 'latent down')" $high "$(file prompt residual 'residual d router')"
    holds "$(file expected combine combine)" $low "$(file prompt wgrad 'wgrad latent down')"
)
check "the maps of a latent width" 0 '^yyyyyyyyyyn$' echo "$links"

# Three norms of the block's input, for the router, the experts and the shared expert; norms of both outputs and of their
# sum: what each hands on, and where the gradients meet.
"$expar" check -q 'layer T=16 E=4 K=2 H=10 F=6 S=5 dtype=f64 dialect=hf-5.24/gemma4 around=block_norm+routed_norm+shared_norm+shared_in_norm' --dump norms >/dev/null 2>&1
calls=norms x=$((16 * 10 * 8))
# passes STAGE SITE STAGE SITE: the last output of the first call is an input of the second.
passes() {
    holds "$(file expected "$1" "$2")" $x "$(file prompt "$3" "$4")"
}
input=$(file prompt rmsnorm rmsnorm)
links=$(
    holds "$input" $x "$(file prompt rmsnorm 'router rmsnorm')"
    holds "$input" $x "$(file prompt rmsnorm 'shared in norm')"
    holds "$input" $x "$(file prompt residual residual)"
    passes residual 'router over root' router router
    passes residual 'router over root' wgrad 'wgrad router'
    passes rmsnorm rmsnorm permute permute
    passes rmsnorm 'shared in norm' shared shared
    passes rmsnorm 'shared in norm' wgrad 'wgrad shared w1'
    passes combine combine rmsnorm 'routed norm'
    passes combine combine rmsnorm_bwd 'routed norm'
    passes shared shared rmsnorm 'shared norm'
    passes shared shared rmsnorm_bwd 'shared norm'
    passes rmsnorm 'routed norm' residual 'residual shared'
    passes rmsnorm 'shared norm' residual 'residual shared'
    passes residual 'residual shared' rmsnorm 'block norm'
    passes rmsnorm 'block norm' residual residual
    passes rmsnorm_bwd 'block norm' rmsnorm_bwd 'routed norm'
    passes rmsnorm_bwd 'block norm' rmsnorm_bwd 'shared norm'
    passes rmsnorm_bwd 'routed norm' combine_bwd combine_bwd
    passes rmsnorm_bwd 'shared norm' shared_bwd shared_bwd
    passes shared_bwd shared_bwd rmsnorm_bwd 'shared in norm'
    passes router_bwd router_bwd residual 'router d over root'
    passes residual 'router d over root' rmsnorm_bwd 'router rmsnorm_bwd'
    passes permute_bwd permute_bwd rmsnorm_bwd rmsnorm_bwd
    passes rmsnorm_bwd rmsnorm_bwd residual 'residual d'
    passes residual 'residual d' residual 'residual d router'
    passes rmsnorm_bwd 'router rmsnorm_bwd' residual 'residual d router'
    passes residual 'residual d router' residual 'residual d shared'
    passes rmsnorm_bwd 'shared in norm' residual 'residual d shared'
)
check "the norms around both outputs" 0 '^y{29}$' echo "$links"

# The router's state goes from block to block, and its gradient back. Layer 1's calls come second forward, first backward.
"$expar" check -q 'layer T=16 E=4 K=1 H=10 F=6 R=8 layers=2 dtype=f64 dialect=hf-5.24/zaya' --dump recurrent >/dev/null 2>&1
calls=recurrent
# nth KIND STAGE SITE N: that of the N-th such call.
nth() {
    file "$1" "$2" "$3" | sed -n "$4p"
}
state=$((16 * 8 * 8)) x=$((16 * 10 * 8))
links=$(
    holds "$(nth expected router 'router down' 1)" $state "$(nth prompt carry carry 1)" # b: the state before
    holds "$(nth expected router 'router down' 2)" $state "$(nth prompt carry carry 1)" # a: its own
    holds "$(nth expected router 'router down' 1)" $state "$(nth prompt rmsnorm 'router rmsnorm' 1)"
    holds "$(nth expected carry carry 1)" $state "$(nth prompt rmsnorm 'router rmsnorm' 2)"
    holds "$(nth expected rmsnorm 'router rmsnorm' 2)" $state "$(nth prompt router 'router fc1' 2)"
    holds "$(nth expected rmsnorm 'router rmsnorm' 2)" $state "$(nth prompt wgrad 'wgrad router fc1' 1)"
    holds "$(nth expected router 'router fc1' 2)" $state "$(nth prompt gelu 'router gelu 1' 2)"
    holds "$(nth expected gelu 'router gelu 1' 2)" $state "$(nth prompt router 'router fc2' 2)"
    holds "$(nth expected router 'router fc2' 2)" $state "$(nth prompt gelu 'router gelu 2' 2)"
    holds "$(nth expected gelu 'router gelu 2' 2)" $state "$(nth prompt router router 2)"
    holds "$(nth expected router_bwd router_bwd 1)" $state "$(nth prompt gelu_bwd 'router gelu_bwd 2' 1)"
    holds "$(nth expected router 'router fc2' 2)" $state "$(nth prompt gelu_bwd 'router gelu_bwd 2' 1)"
    holds "$(nth expected gelu_bwd 'router gelu_bwd 2' 1)" $state "$(nth prompt router_bwd 'router fc2' 1)"
    holds "$(nth expected gelu_bwd 'router gelu_bwd 2' 1)" $state "$(nth prompt wgrad 'wgrad router fc2' 1)"
    holds "$(nth expected gelu_bwd 'router gelu_bwd 2' 1)" $state "$(nth prompt wgrad 'wgrad router fc2 bias' 1)"
    holds "$(nth expected gelu 'router gelu 1' 2)" $state "$(nth prompt wgrad 'wgrad router fc2' 1)"
    holds "$(nth expected gelu 'router gelu 2' 2)" $state "$(nth prompt wgrad 'wgrad router' 1)"
    holds "$(nth expected router_bwd 'router fc2' 1)" $state "$(nth prompt gelu_bwd 'router gelu_bwd 1' 1)"
    holds "$(nth expected router 'router fc1' 2)" $state "$(nth prompt gelu_bwd 'router gelu_bwd 1' 1)"
    holds "$(nth expected gelu_bwd 'router gelu_bwd 1' 1)" $state "$(nth prompt router_bwd 'router fc1' 1)"
    holds "$(nth expected gelu_bwd 'router gelu_bwd 1' 1)" $state "$(nth prompt wgrad 'wgrad router fc1' 1)"
    holds "$(nth expected gelu_bwd 'router gelu_bwd 1' 1)" $state "$(nth prompt wgrad 'wgrad router fc1 bias' 1)"
    holds "$(nth expected router_bwd 'router fc1' 1)" $state "$(nth prompt rmsnorm_bwd 'router rmsnorm_bwd' 1)"
    holds "$(nth expected carry carry 1)" $state "$(nth prompt rmsnorm_bwd 'router rmsnorm_bwd' 1)"
    holds "$(nth expected rmsnorm_bwd 'router rmsnorm_bwd' 1)" $state "$(nth prompt carry_bwd carry_bwd 1)"
    holds "$(nth expected rmsnorm_bwd 'router rmsnorm_bwd' 1)" $state "$(nth prompt router_bwd 'router down' 1)"
    holds "$(nth expected rmsnorm_bwd 'router rmsnorm_bwd' 2)" $state "$(nth prompt residual 'residual d state' 1)"
    holds "$(nth prompt residual 'residual d state' 1)" $state "$(nth expected carry_bwd carry_bwd 1)" # its b
    holds "$(nth expected router 'router down' 1)" $state "$(nth prompt carry_bwd carry_bwd 1)"
    holds "$(nth expected residual 'residual d state' 1)" $state "$(nth prompt router_bwd 'router down' 2)"
    holds "$(nth expected residual 'residual d state' 1)" $state "$(nth prompt wgrad 'wgrad router down' 2)"
    holds "$(nth expected residual 'residual d state' 1)" $state "$(nth prompt wgrad 'wgrad router down bias' 2)"
    holds "$(nth prompt router 'router down' 1)" $x "$(nth prompt wgrad 'wgrad router down' 2)"
    holds "$(nth expected router_bwd 'router down' 2)" $x "$(nth prompt residual 'residual d router' 2)"
    holds "$(nth expected gelu 'router gelu 2' 1)" $state "$(nth prompt router router 2)"
)
check "the router's MLP and its state" 0 '^y{34}n$' echo "$links"
# has PATH OPERAND: y when the file has that operand.
has() {
    grep -aqF "\"in.$2\"" "$calls/$1" && printf y || printf n
}
biases=$(
    for site in 'router down' 'router fc1' 'router fc2' router; do
        has "$(nth prompt router "$site" 2)" bias
    done
)
check "biases of the router's maps" 0 '^yyyn$' echo "$biases"
"$expar" check -q 'layer T=16 E=4 K=2 H=10 F=6 dtype=f64 dialect=hf-5.24/gpt_oss' --dump biased >/dev/null 2>&1
calls=biased
check "the gate's bias" 0 '^yyy$' echo "$(has "$(file prompt router router)" bias)$(has "$(file prompt expert expert)" b1)$(has "$(file prompt expert expert)" b2)"

# The same with norms and a bias around the experts: all 32 rows of the one rank's experts are there.
"$expar" check -q 'layer T=16 E=4 K=2 H=10 F=6 D=8 S=5 dtype=f64 around=latent_norm+expert_norm+out_bias+block_norm dialect=hf-5.24/nemotron_h' --dump around >/dev/null 2>&1
calls=around
rows=$((32 * 8 * 8)) dw=$((16 * 2 * 8))
sum=$(file expected residual 'residual shared') biased=$(file expected embed 'out bias')
outer=$(file expected rmsnorm_bwd 'block norm') inner=$(file expected rmsnorm_bwd 'latent norm')
links=$(
    holds "$(file expected router 'latent down')" $low "$(file prompt rmsnorm 'latent norm')"
    holds "$(file expected rmsnorm 'latent norm')" $low "$(file prompt permute permute)"
    holds "$(file expected expert expert)" $rows "$(file prompt rmsnorm 'expert norm')"
    holds "$(file expected rmsnorm 'expert norm')" $rows "$(file prompt combine combine)"
    holds "$(file expected expert expert)" $rows "$(file prompt combine combine)"
    holds "$sum" $high "$(file prompt embed 'out bias')"
    holds "$biased" $high "$(file prompt rmsnorm 'block norm')"
    holds "$sum" $high "$(file prompt residual residual)"
    holds "$(file expected rmsnorm 'block norm')" $high "$(file prompt residual residual)"
)
check "norms and a bias around the experts" 0 '^yyyynyyny$' echo "$links"
links=$(
    holds "$biased" $high "$(file prompt rmsnorm_bwd 'block norm')"
    holds "$outer" $high "$(file prompt wgrad 'wgrad out bias')"
    holds "$outer" $high "$(file prompt shared_bwd shared_bwd)"
    holds "$outer" $high "$(file prompt router_bwd 'latent up')"
    holds "$outer" $high "$(file prompt residual 'residual d')"
    holds "$(file expected combine_bwd combine_bwd)" $rows "$(file prompt rmsnorm_bwd 'expert norm')" $((rows + dw))
    holds "$(file expected expert expert)" $rows "$(file prompt rmsnorm_bwd 'expert norm')"
    holds "$(file expected rmsnorm_bwd 'expert norm')" $rows "$(file prompt expert_bwd expert_bwd)"
    holds "$(file expected rmsnorm_bwd 'expert norm')" $rows "$(file prompt wgrad 'wgrad w2')"
    holds "$(file expected permute_bwd permute_bwd)" $low "$(file prompt rmsnorm_bwd 'latent norm')"
    holds "$(file expected router 'latent down')" $low "$(file prompt rmsnorm_bwd 'latent norm')"
    holds "$inner" $low "$(file prompt router_bwd 'latent down')"
    holds "$inner" $low "$(file prompt wgrad 'wgrad latent down')"
)
check "and their gradients" 0 '^yyyynyyyyyyyy$' echo "$links"
check "gen without a folder" 2 'gen' "$expar" gen 'rmsnorm T=5'

# ---- what no vector covers, and what tells dialects apart
mkdir none
check "a preset without vectors" 0 'mixtral.*no vector covers it' env EXPAR_GOLDEN="$dir/none" "$expar" list models
"$expar" list models >out
if grep -q 'no vector' out; then
    echo "note: $(grep -c 'no vector' out) models whose dialect no vector covers"
fi
"$expar" selftest dialects >matrix
check "dialects are told apart" 0 '^PASS [0-9]+ dialects: [0-9]+ pairs, 0 told apart in neither' "$expar" selftest dialects
check "no cell is empty" 0 '^none$' sh -c "grep -E '^ ?[0-9]+ [A-Q] .*  -( |$)' matrix || echo none"
check "another selftest" 2 "'dialect'" "$expar" selftest dialect

echo "vectors: $passed passed, $failed failed"
[ $failed -eq 0 ]
