#!/usr/bin/env bash
# The program from outside: bad input of every command gives one clear line that names the field and the value, and the documented exit code.
#   cli.sh PROGRAM BUILD_DIR
set -u
expar=$1
build=$2
passed=0 failed=0
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir" || exit 1
unset RANK WORLD_SIZE EXPAR_CASES EXPAR_MODELS NO_COLOR

# check NAME CODE PATTERN COMMAND...: exit code and, on standard error or output, a line that matches PATTERN (extended regex).
check() {
    local name=$1 code=$2 pattern=$3 got
    shift 3
    "$@" >out 2>err </dev/null
    got=$?
    if [ $got -ne "$code" ]; then
        echo "not ok  $name: exit code $got, expected $code: $(head -n 2 err | tr '\n' ' ')"
        failed=$((failed + 1))
    elif ! cat err out | grep -qE -- "$pattern"; then
        echo "not ok  $name: nothing matches '$pattern' in: $(cat err out | head -n 3 | tr '\n' ' ')"
        failed=$((failed + 1))
    elif [ "$code" -ne 0 ] && [ "$(wc -l <err)" -gt 2 ]; then
        echo "not ok  $name: $(wc -l <err) lines of error, expected one or two"
        failed=$((failed + 1))
    else
        passed=$((passed + 1))
    fi
}

good_model='{"model_type":"qwen3_moe","num_hidden_layers":2,"hidden_size":64,"intermediate_size":128,"moe_intermediate_size":32,"num_experts":8,
"num_experts_per_tok":2,"norm_topk_prob":true,"decoder_sparse_step":1,"mlp_only_layers":[],"rms_norm_eps":1e-6,"vocab_size":1000,"hidden_act":"silu","router_aux_loss_coef":0.001}'
model() { printf '%s' "$good_model" | sed "$1" >"$2"; }

# ---- commands and options
check "no command" 2 'command: none' "$expar"
check "unknown command" 2 "command: 'chekc'" "$expar" chekc
check "help" 0 'usage' "$expar" --help
check "help of a command" 0 'expar plan' "$expar" plan --help
check "version" 0 'expar [0-9]' "$expar" version
check "version with a word" 2 "version: .*'x'" "$expar" version x
check "unknown option, nearest" 2 '--tokns: .*--tokens' "$expar" step --tokns 4
check "option given twice" 2 '--seed: given twice' "$expar" check --seed 1 --seed 2
check "missing value" 2 '--mesh: the value is missing' "$expar" check --mesh
check "option of another command" 2 '--fault: .*plan' "$expar" plan --fault x
check "flag with a value" 2 '--json: takes no value' "$expar" list --json=1
check "not a number" 2 "--tokens: '12x'" "$expar" step --model qwen3-30b-a3b --tokens 12x
check "number out of range" 2 "--layers: '0'" "$expar" plan --model qwen3-30b-a3b --layers 0
check "negative seed" 2 "--seed: '-1'" "$expar" check --seed -1
check "bad colour" 2 "--color: 'blue'" "$expar" list --color blue
check "suffix K" 0 'tokens +2048' "$expar" plan --model qwen3-30b-a3b --tokens 2K

# ---- models
check "missing model file" 4 'nosuch.json' "$expar" plan --model nosuch.json
check "model with check" 4 'nosuch.json' "$expar" check --model nosuch.json
check "model with step" 4 'nosuch.json' "$expar" step --model nosuch.json
check "no model" 2 '--model: missing' "$expar" plan
check "a folder as model" 4 'folder' "$expar" plan --model "$dir/"
model 's/x/x/' good.json
check "a good model" 0 'MoE blocks' "$expar" plan --model ./good.json
printf '{"model_type":' >torn.json
check "torn JSON" 4 'torn.json' "$expar" plan --model ./torn.json
printf '[1]' >array.json
check "JSON that is no object" 4 'array.json' "$expar" plan --model ./array.json
: >empty.json
check "empty file" 4 'empty.json' "$expar" plan --model ./empty.json
model 's/"num_experts":8/"num_experts":8,"num_experts":9/' dup.json
check "duplicate key" 4 'num_experts' "$expar" plan --model ./dup.json
model 's/"num_experts_per_tok":2/"num_experts_per_tok":9/' k.json
check "k above E in a file" 4 'num_experts_per_tok.*9' "$expar" plan --model ./k.json
check "k above E as an option" 2 'k: 200' "$expar" plan --model qwen3-30b-a3b --topk 200
model 's/"norm_topk_prob":true,//' norm.json
check "missing routing field" 4 'norm_topk_prob' "$expar" plan --model ./norm.json
model 's/"num_experts":8/"num_experts":"8"/' string.json
check "text for a number" 4 'num_experts' "$expar" plan --model ./string.json
model 's/"hidden_size":64/"hidden_size":-64/' negative.json
check "negative width" 4 'hidden_size.*-64' "$expar" plan --model ./negative.json
model 's/1e-6/NaN/' nan.json
check "NaN" 4 'nan.json' "$expar" plan --model ./nan.json
model 's/qwen3_moe/mystery_moe/' mystery.json
check "unknown model_type" 4 'mystery_moe' "$expar" plan --model ./mystery.json
model 's/"vocab_size"/"expert_wobble":1,"vocab_size"/' wobble.json
check "unknown key about experts" 4 'expert_wobble' "$expar" plan --model ./wobble.json
check "shrink with a remainder" 2 'shrink' "$expar" plan --model ./good.json --shrink 7
check "more layers than the model has" 2 'layers.*3' "$expar" plan --model ./good.json --layers 3
mkdir models && cp good.json models/mine.json
check "model directory" 0 'mine' env EXPAR_MODELS="$dir/models" "$expar" list models

# ---- meshes
check "ep that does not divide the world" 2 'ep 4.*world 6' "$expar" check 'smoke*' --mesh sim:fsdp=6,ep=4
check "the same, for step" 2 'ep 4.*world 6' "$expar" step --model ./good.json --mesh sim:fsdp=6,ep=4
check "unknown mesh kind" 2 'mehs' "$expar" plan --model ./good.json --mesh mehs:fsdp=2
check "unknown mesh key" 2 'fsdpp' "$expar" plan --model ./good.json --mesh sim:fsdpp=2
check "zero ranks" 2 'fsdp.*0' "$expar" plan --model ./good.json --mesh sim:fsdp=0
check "experts that ep does not divide" 2 '8.*3|3.*8' "$expar" plan --model ./good.json --mesh sim:ep=3
check "a mesh that is not here" 5 'SKIP' "$expar" check 'residual T=4 H=4' --mesh mpi
check "text missing" 4 'nosuch.txt' "$expar" step --model ./good.json --text nosuch.txt
check "text empty" 4 'empty.json' "$expar" step --model ./good.json --text empty.json
check "unknown backend" 2 "impl: 'cuda'" "$expar" check 'smoke*' --impl cuda
check "unknown fault" 2 "fault: 'x'" "$expar" check 'smoke*' --fault x

# ---- cases
check "unmatched glob" 5 "nothing matches 'nosuch\\*'" "$expar" check 'nosuch*'
check "unknown stage" 2 "'expret'" "$expar" check 'expret T=4'
check "unknown key" 2 'Z|zeta' "$expar" check 'residual zeta=4'
check "key given twice" 2 'T: given twice' "$expar" check 'residual T=4 T=5'
check "bad value" 2 "T: 'x'" "$expar" check 'residual T=x'
check "bad dtype" 2 'bf17' "$expar" check 'residual T=4 dtype=bf17'
check "K above E" 2 'K: 9 .*E is 8' "$expar" check 'layer T=4 E=8 K=9'
check "E not split by ep" 2 'E: 9 .*ep 2' "$expar" check 'layer T=4 E=9 mesh=sim:ep=2'
check "empty value" 2 'T' "$expar" check 'residual T=1,,2'
check "missing case file" 4 'nosuch.txt' "$expar" check ./nosuch.txt
printf 'residual T=4\nresidual T=q\n' >bad.txt
check "bad line in a case file" 4 'bad.txt:2: T' "$expar" check ./bad.txt
printf '# nothing\n' >none.txt
check "a case file without cases" 5 'nothing matches' "$expar" check ./none.txt
mkdir cases && printf 'residual T=4 H=8 name=mine\n' >cases/own.txt
check "case directory" 0 'own/mine' env EXPAR_CASES="$dir/cases" "$expar" check 'own/*'
check "case directory missing" 4 'nowhere' env EXPAR_CASES="$dir/nowhere" "$expar" check 'own/*'
check "exclusive options" 2 'exclude' "$expar" check 'smoke*' --random 3
check "--tokens without a model" 2 '--model' "$expar" check 'smoke*' --tokens 4
check "a vacuous case" 1 'VACUOUS' "$expar" check 'residual T=0 H=4'
check "a vacuous case that says so" 0 'PASS' "$expar" check 'residual T=0 H=4 expect=zero'
check "an expectation that does not hold" 1 'expects zero' "$expar" check 'residual T=4 H=4 expect=zero'
check "a line of one's own" 0 'PASS 4' "$expar" check 'residual T=4 H=4,5 dtype=f32,bf16'
check "dense is judged by ref" 0 'PASS 1 ' "$expar" check 'residual T=4 H=4' --impl dense

# ---- the launch environment
check "WORLD_SIZE without RANK" 3 'RANK: missing.*WORLD_SIZE' env WORLD_SIZE=4 "$expar" check 'smoke*'
check "RANK without WORLD_SIZE" 3 'WORLD_SIZE: missing' env RANK=1 "$expar" version
check "RANK beyond WORLD_SIZE" 3 "RANK: '5'" env RANK=5 WORLD_SIZE=4 "$expar" version
check "RANK with a blank" 3 "RANK: '1 '" env RANK='1 ' WORLD_SIZE=4 "$expar" version
check "WORLD_SIZE not a number" 3 "WORLD_SIZE: 'four'" env WORLD_SIZE=four "$expar" version
check "a world of one" 0 'expar' env RANK=0 WORLD_SIZE=1 "$expar" version
check "two launchers that disagree" 3 'rank 0 of 1.*rank 1 of 2' env RANK=0 WORLD_SIZE=1 OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 "$expar" version

# ---- plugins
check "plugin without a slash" 2 "has no '/'" "$expar" check 'residual T=4' --impl plugin:null.so
check "plugin that is not there" 4 'nosuch.so' "$expar" check 'residual T=4' --impl plugin:./nosuch.so
check "plugin of another abi" 12 'abi [0-9]+, this program' "$expar" check 'residual T=4' --impl "plugin:$build/plugin/broken_abi.so"
check "plugin of another size" 12 'size [0-9]+, expected' "$expar" check 'residual T=4' --impl "plugin:$build/plugin/broken_size.so"
check "plugin that returns NULL" 12 'NULL' "$expar" check 'residual T=4' --impl "plugin:$build/plugin/broken_null.so"
check "plugin with a foreign stage" 12 'row 0' "$expar" check 'residual T=4' --impl "plugin:$build/plugin/broken_row.so"
check "plugin without the symbol" 12 'xp_plugin' "$expar" check 'residual T=4' --impl "plugin:$build/plugin/broken_symbol.so"
check "the template's one row" 0 'PASS 1 ' "$expar" check 'residual T=33 H=17' --impl "plugin:$build/plugin/null.so"
check "the template's row, another dtype" 5 'UNSUPPORTED.*' "$expar" check 'residual T=33 H=17 dtype=bf16' --impl "plugin:$build/plugin/null.so"
check "a stage that the template has not" 5 'UNSUPPORTED' "$expar" check 'rmsnorm T=3 H=4' --impl "plugin:$build/plugin/null.so"

# ---- output
check "results file" 0 'PASS' "$expar" check 'residual T=4 H=4' -J r.json
check "results are JSON" 0 'valid' bash -c "'$build/tests/jsonok' cases <r.json && echo valid"
check "results to nowhere" 11 'nowhere' "$expar" check 'residual T=4 H=4' -J nowhere/r.json
check "full disk" 11 'standard output' bash -c "'$expar' list >/dev/full"
for what in 'list' 'plan --model ./good.json' 'explain dispatch' 'explain grad-times-ep' 'explain exit'; do
    if "$expar" $what --json | "$build/tests/jsonok"; then
        passed=$((passed + 1))
    else
        echo "not ok  $what --json is no JSON"
        failed=$((failed + 1))
    fi
done
check "unknown list" 2 "'stagse'" "$expar" list stagse
check "unknown name to explain" 2 "'nosuch'" "$expar" explain nosuch
check "nothing to explain" 2 'one name' "$expar" explain
check "colour when asked for" 0 $'\033' "$expar" check 'residual T=4 H=4' --color always

echo "cli: $passed passed, $failed failed"
[ $failed -eq 0 ]
