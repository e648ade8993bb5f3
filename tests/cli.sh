#!/usr/bin/env bash
# The program from outside: bad input of every command gives one clear line that names the field and the value, and the documented exit code.
#   cli.sh PROGRAM BUILD_DIR
set -u
expar=$(realpath "$1") build=$(realpath "$2") source=$(realpath "$(dirname "$0")/..")
passed=0 failed=0
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir" || exit 1
unset RANK WORLD_SIZE OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE PMI_RANK PMI_SIZE SLURM_PROCID SLURM_STEP_NUM_TASKS
unset EXPAR_CASES EXPAR_MODELS NO_COLOR

# result NAME [WHAT IS WRONG]
result() {
    if [ -z "${2:-}" ]; then
        passed=$((passed + 1))
        echo "ok $((passed + failed)) $1"
    else
        failed=$((failed + 1))
        echo "not ok $((passed + failed)) $1: $2"
    fi
}

# check NAME CODE PATTERN COMMAND...: the exit code; on standard error (of a command that succeeds: output or error) a line that matches
# PATTERN (extended regex); and of a command that fails, its message is one line, with the hint about --help two.
check() {
    local name=$1 code=$2 pattern=$3 got where=err
    shift 3
    "$@" >out 2>err </dev/null
    got=$?
    # Verdicts are output, and so is why nothing ran.
    case $code in 0 | 1 | 5) where='err out' ;; esac
    [ -n "${in_output:-}" ] && where=out
    if [ $got -ne "$code" ]; then
        result "$name" "expected exit $code, got $got: $(head -n 2 err | tr '\n' ' ')"
    elif ! cat $where | grep -qE -- "$pattern"; then
        result "$name" "nothing matches '$pattern' in: $(cat $where | head -n 3 | tr '\n' ' ')"
    elif [ "$code" -ne 0 ] && [ "$(grep -cv 'try `expar --help`' err)" -gt 1 ]; then
        result "$name" "$(wc -l <err) lines of error, expected one"
    elif grep -qE 'Sanitizer|runtime error' err; then
        result "$name" "$(grep -E 'Sanitizer|runtime error' err | head -n 1)"
    else
        result "$name"
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
check "missing value before another option" 2 '--mesh: the value is missing' "$expar" check --mesh --seed 1
check "short option with its value" 2 "-q: takes no value, got '1'" "$expar" check -q=1
check "words are no help" 5 "nothing matches 'help'" "$expar" check help
check "help in place of a command" 0 'expar check' "$expar" help
check "a word for plan" 2 "plan: 'x'" "$expar" plan x
check "a word for step" 2 "step: 'x'" "$expar" step x
check "learning rate" 2 "--lr: 'x'" "$expar" step --lr x
check "steps" 2 "--steps: '0'" "$expar" step --steps 0
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
check "k above E with check" 2 'k: 200' "$expar" check --model qwen3-30b-a3b --topk 200
check "k above E with step" 2 'k: 200' "$expar" step --model qwen3-30b-a3b --topk 200
check "k above E in a file, with check" 4 'k.json.*num_experts_per_tok.*9' "$expar" check --model ./k.json
check "k above E in a file, with step" 4 'k.json.*num_experts_per_tok.*9' "$expar" step --model ./k.json
check "experts below k as an option" 2 'k: 8' "$expar" plan --model qwen3-30b-a3b --experts 4
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
check "a name that is no model" 4 'nosuch' "$expar" plan --model nosuch
check "a model case without its model" 4 'nosuch' "$expar" check 'layer T=8 model=nosuch'
printf '{"model_type":"qwen3_moe"}' >bare.json
check "a file without sizes" 4 'bare.json' "$expar" plan --model ./bare.json
printf 'not json' >text.json
check "text that is no JSON" 4 'text.json' "$expar" plan --model ./text.json
head -c 300 /dev/urandom >noise.json
check "noise" 4 'noise.json' "$expar" plan --model ./noise.json
printf '%s x' "$good_model" >tail.json
check "something after the JSON" 4 'tail.json' "$expar" plan --model ./tail.json
model 's/"num_experts":8/"num_experts":1e400/' huge.json
check "a number beyond doubles" 4 'huge.json' "$expar" plan --model ./huge.json
model 's/"num_experts":8/"num_experts":8.5/' half.json
check "half an expert" 4 'half.json.*num_experts' "$expar" plan --model ./half.json
model 's/"num_experts":8/"num_experts":null/' null.json
check "null for a number" 4 'null.json.*num_experts' "$expar" plan --model ./null.json
check "unreadable model directory" 4 'nowhere' env EXPAR_MODELS="$dir/nowhere" "$expar" list models
mkdir models && cp good.json models/mine.json
check "model directory" 0 'mine' env EXPAR_MODELS="$dir/models" "$expar" list models

# ---- weights of a file
# safetensors NAME TENSORS...: tensors "name:rows:columns" of bf16, one after another. The values are bytes of a text as low halves and 0x3d
# or 0xbd, by the letter, as high ones: +-0.03 to 0.12.
safetensors() {
    local file=$1 header='{' at=0 size n r c
    shift
    for t in "$@"; do
        IFS=: read -r n r c <<<"$t"
        size=$((r * c * 2))
        header+="\"$n\":{\"dtype\":\"BF16\",\"shape\":[$r,$c],\"data_offsets\":[$at,$((at + size))]},"
        at=$((at + size))
    done
    header="${header%,}}"
    {
        printf "$(printf '\\x%02x' $((${#header} & 255)) $((${#header} >> 8 & 255)) $((${#header} >> 16 & 255)) 0 0 0 0 0)"
        printf '%s' "$header"
        cat "$source"/golden/text/*.txt "$source"/golden/text/*.txt | tr -d '\n' |
            LC_ALL=C sed "s/./&=/g; s/\\([aeilorst]\\)=/\\1$(printf '\275')/g" | head -c "$at"
    } >"$file"
}
block() {
    printf '%s\n' "model.layers.1.mlp.gate.weight:8:64"
    for e in 0 1 2 3 4 5 6 7; do
        printf 'model.layers.1.mlp.experts.%s:%s\n' "$e.gate_proj.weight" 32:64 "$e.up_proj.weight" 32:64 "$e.down_proj.weight" 64:32
    done
}
model 's/"num_experts":8/"num_experts":9/' nine.json
cp good.json good.txt
mkdir w two && safetensors w/model.safetensors $(block)
safetensors two/a.safetensors $(block | grep -v 'experts.[4-7]') && safetensors two/b.safetensors $(block | grep 'experts.[4-7]')
{
    printf '{"weight_map":{"lm_head.weight":"absent.safetensors"'
    for t in $(block); do printf ',"%s":"%s.safetensors"' "${t%%:*}" "$(case $t in *experts.[4-7]*) echo b ;; *) echo a ;; esac)"; done
    printf '}}'
} >two/model.safetensors.index.json
check "weights of a file" 0 'PASS 1 ' "$expar" check --model ./good.json --layer 1 --weights w/model.safetensors --tokens 64
check "weights of a folder" 0 'layer 1 of 2 layers; MoE weights of w,' "$expar" check --model ./good.json --layer 1 --weights w --tokens 64
check "weights of several files, on ranks" 0 'every bit the same' \
    "$expar" check --model ./good.json --layer 1 --weights two --tokens 64 --mesh sim:fsdp=4,ep=2
check "the way back to weights" 1 'repro .*--layer 1 --weights w --tokens 64 --mesh sim:fsdp=2,ep=2 --seed 1 --fault' \
    "$expar" check --model ./good.json --layer 1 --weights w --tokens 64 --mesh sim:fsdp=2,ep=2 --fault grad-times-ep
check "one seeded layer" 0 'layer 1 of 2 layers; seeded' "$expar" check --model ./good.json --layer 1 --tokens 64
check "weights without the layer" 4 "w/model.safetensors: no tensor of layer 0's MoE block" "$expar" check --model ./good.json --weights w
check "weights of another size" 4 "gate.weight' .router.: shape is \[8,64\], expected \[9,64\]" "$expar" check --model ./nine.json --weights w --layer 1
safetensors short.safetensors $(block | grep -v '7.down_proj')
check "a missing expert" 4 "no tensor 'model.layers.1.mlp.experts.7.down_proj.weight'" \
    "$expar" check --model ./good.json --weights short.safetensors --layer 1
safetensors long.safetensors $(block) model.layers.1.mlp.gate.wobble:1:1
check "a tensor that nothing asks for" 4 "'model.layers.1.mlp.gate.wobble'.*asks for it" \
    "$expar" check --model ./good.json --weights long.safetensors --layer 1
check "no such weights" 4 'nosuch.safetensors' "$expar" check --model ./good.json --weights nosuch.safetensors
check "a folder without weights" 4 'models: holds neither' "$expar" check --model ./good.json --weights models
check "weights that are no safetensors" 4 'good.txt' "$expar" check --model ./good.json --weights good.txt --layer 1
check "weights and another width" 2 '--shrink' "$expar" check --model ./good.json --weights w --layer 1 --shrink 2
check "weights and other experts" 2 '--experts' "$expar" check --model ./good.json --weights w --layer 1 --experts 4
check "weights without a model" 2 '--weights needs --model' "$expar" check --weights w
check "a layer without a model" 2 '--layer needs --model' "$expar" check --layer 1
check "a layer and layers" 2 '--layers and --layer exclude' "$expar" check --model ./good.json --layer 1 --layers 2
check "a layer that is not there" 2 '--layer: 2 .*2 layers' "$expar" check --model ./good.json --layer 2
check "a dense layer" 2 '--layer: 0 is no MoE block' "$expar" check --model deepseek-v3 --layer 0
check "names of a model's tensors" 0 'model.layers.0.mlp.experts.\{E\}.gate_proj.weight \[32,64\]' "$expar" explain ./good.json

# ---- meshes
check "ep that does not divide the world" 2 'ep 4.*world 6' "$expar" check 'smoke*' --mesh sim:fsdp=6,ep=4
check "the same, for step" 2 'ep 4.*world 6' "$expar" step --model ./good.json --mesh sim:fsdp=6,ep=4
check "unknown mesh kind" 2 'mehs' "$expar" plan --model ./good.json --mesh mehs:fsdp=2
check "the same, for plan" 2 'ep 4.*world 6' "$expar" plan --model ./good.json --mesh sim:fsdp=6,ep=4
check "the same, for check of a model" 2 'ep 4.*world 6' "$expar" check --model ./good.json --mesh sim:fsdp=6,ep=4
check "the same, before nothing matches" 2 'ep 4.*world 6' "$expar" check 'nosuch*' --mesh sim:fsdp=6,ep=4
check "unknown kind for cases" 2 'mehs' "$expar" check 'smoke*' --mesh mehs
check "a kind where a mesh is wanted" 2 "mesh 'sim'" "$expar" plan --model ./good.json --mesh sim
check "a mesh without keys" 2 "mesh 'sim:'" "$expar" plan --model ./good.json --mesh sim:
check "a mesh without kind" 2 'mesh' "$expar" plan --model ./good.json --mesh fsdp=2
check "too many ranks" 2 '65.*64' "$expar" plan --model ./good.json --mesh sim:fsdp=65
check "a key given twice" 2 'fsdp' "$expar" plan --model ./good.json --mesh sim:fsdp=2,fsdp=2
check "a mesh with a blank" 2 'blank' "$expar" plan --model ./good.json --mesh 'sim:fsdp=2, ep=2'
check "a kind for each case" 0 'PASS 2 ' "$expar" check 'residual T=4 H=4 mesh=mpi:fsdp=1,2' --mesh sim
check "unknown mesh key" 2 'fsdpp' "$expar" plan --model ./good.json --mesh sim:fsdpp=2
check "zero ranks" 2 'fsdp.*0' "$expar" plan --model ./good.json --mesh sim:fsdp=0
check "experts that ep does not divide" 2 '8.*3|3.*8' "$expar" plan --model ./good.json --mesh sim:ep=3
check "a mesh that is not here" 5 'SKIP' "$expar" check 'residual T=4 H=4' --mesh mpi
check "other meshes that are not here" 5 'SKIP +4|SKIP 4' "$expar" check 'residual T=4 mesh=mpi:fsdp=2,tcp:fsdp=2,nccl:fsdp=2,cuda:fsdp=2'
check "a mesh that is not here, for step" 6 'mpi' "$expar" step --model ./good.json --mesh mpi:fsdp=2
check "text missing" 4 'nosuch.txt' "$expar" step --model ./good.json --text nosuch.txt
check "text empty" 4 'empty.json' "$expar" step --model ./good.json --text empty.json
check "text missing, for check" 4 'nosuch.txt' "$expar" check 'smoke*' --text nosuch.txt
check "a folder as text" 4 'models' "$expar" step --model ./good.json --text models
mkfifo pipe
check "a pipe as text" 4 'pipe.*regular' timeout 10 "$expar" step --model ./good.json --text pipe
check "unknown backend, for step" 2 "impl: 'cuda'" "$expar" step --model ./good.json --impl cuda
check "unknown fault, for step" 2 "fault: 'x'" "$expar" step --model ./good.json --fault x
check "unknown backend" 2 "impl: 'cuda'" "$expar" check 'smoke*' --impl cuda
check "unknown fault" 2 "fault: 'x'" "$expar" check 'smoke*' --fault x

# ---- cases
check "unmatched glob" 5 "nothing matches 'nosuch\\*'" "$expar" check 'nosuch*'
check "unknown stage" 2 "'expret'" "$expar" check 'expret T=4'
check "unknown key" 2 'zeta: residual' "$expar" check 'residual zeta=4'
check "key given twice" 2 'T: given twice' "$expar" check 'residual T=4 T=5'
check "bad value" 2 "T: 'x'" "$expar" check 'residual T=x'
check "bad dtype" 2 'bf17' "$expar" check 'residual T=4 dtype=bf17'
check "K above E" 2 'K: 9 .*E is 8' "$expar" check 'layer T=4 E=8 K=9'
check "E not split by ep" 2 'E: 9 .*ep 2' "$expar" check 'layer T=4 E=9 mesh=sim:ep=2'
check "empty value" 2 'T' "$expar" check 'residual T=1,,2'
check "a size that the stage has not" 2 'E: residual' "$expar" check 'residual E=4'
check "a scalar that is no number" 2 "max_norm: 'x'" "$expar" check 'clip N=4 max_norm=x'
in_output=1 check "a scalar that the stage refuses" 2 'refuses its arguments' "$expar" check 'gradnorm N=4 p=-3'
check "no optional operand" 2 "with: 'foo'" "$expar" check 'residual T=4 with=foo'
check "two types for one" 2 "act: 'bf16' with dtype 'f32'" "$expar" check 'residual dtype=f32 act=bf16'
in_output=1 check "a type that the stage has not" 2 'a cannot be e4m3' "$expar" check 'residual T=4 dtype=e4m3'
check "a mesh in a line" 2 'ep 4.*world 6' "$expar" check 'layer E=4 mesh=sim:fsdp=6,ep=4'
check "a mesh in a line, without kind" 2 'mesh' "$expar" check 'layer E=4 mesh=fsdp=2'
check "the second line is wrong" 2 'K: 9' "$expar" check 'residual T=4' 'layer E=8 K=9'
[ -s out ] && result "nothing runs before a wrong line" "$(head -n 1 out)" || result "nothing runs before a wrong line"
check "seeds of 64 bits" 0 'seed=18446744073709551615' "$expar" check 'residual T=4 seed=18446744073709551615'
check "missing case file" 4 'nosuch.txt' "$expar" check ./nosuch.txt
printf 'residual T=4\nresidual T=q\n' >bad.txt
check "bad line in a case file" 4 'bad.txt:2: T' "$expar" check ./bad.txt
printf '# nothing\n' >none.txt
[ -s out ] && result "nothing of a wrong file runs" "$(head -n 1 out)" || result "nothing of a wrong file runs"
printf 'layer E=8 K=9\n' >k.txt
check "k above E in a case file" 4 'k.txt:1: K: 9' "$expar" check ./k.txt
mkdir x.txt
check "a folder as case file" 4 'x.txt' "$expar" check ./x.txt
check "a case file without cases" 5 'nothing matches' "$expar" check ./none.txt
mkdir cases && printf 'residual T=4 H=8 name=mine\n' >cases/own.txt
check "case directory" 0 'own/mine' env EXPAR_CASES="$dir/cases" "$expar" check 'own/*'
check "case directory missing" 4 'nowhere' env EXPAR_CASES="$dir/nowhere" "$expar" check 'own/*'
check "exclusive options" 2 'exclude' "$expar" check 'smoke*' --random 3
check "--random on a mesh" 2 'random.*--mesh' "$expar" check --random 3 --mesh sim
check "--random and a model" 2 'random.*--model' "$expar" check --random 3 --model ./good.json
check "random cases" 0 'PASS 5 ' "$expar" check --random 5
check "--tokens without a model" 2 '--model' "$expar" check 'smoke*' --tokens 4
check "a vacuous case" 1 'VACUOUS' "$expar" check 'residual T=0 H=4'
check "a vacuous case that says so" 0 'PASS' "$expar" check 'residual T=0 H=4 expect=zero'
check "an expectation that does not hold" 1 'expects zero' "$expar" check 'residual T=4 H=4 expect=zero'
check "a line of one's own" 0 'PASS 4' "$expar" check 'residual T=4 H=4,5 dtype=f32,bf16'
check "dense is judged by ref" 0 'PASS 1 ' "$expar" check 'residual T=4 H=4' --impl dense

# ---- the launch environment
check "WORLD_SIZE without RANK" 3 'RANK: missing.*WORLD_SIZE' env WORLD_SIZE=4 "$expar" check 'smoke*'
check "RANK without WORLD_SIZE" 3 'WORLD_SIZE: missing' env RANK=1 "$expar" version
check "RANK beyond WORLD_SIZE" 3 "RANK: '4'" env RANK=4 WORLD_SIZE=4 "$expar" version
check "RANK with a blank" 3 "RANK: '1 '" env RANK='1 ' WORLD_SIZE=4 "$expar" version
check "WORLD_SIZE not a number" 3 "WORLD_SIZE: 'four'" env WORLD_SIZE=four "$expar" version
check "a world of one" 0 'expar' env RANK=0 WORLD_SIZE=1 "$expar" version
check "RANK is negative" 3 "RANK: '-1'" env RANK=-1 WORLD_SIZE=4 "$expar" version
check "WORLD_SIZE beyond 64 bits" 3 "WORLD_SIZE: '99999999999999999999'" env RANK=0 WORLD_SIZE=99999999999999999999 "$expar" version
check "the environment comes before the options" 3 'RANK: missing' env WORLD_SIZE=2 "$expar" check --nosuch
check "a world that no mesh of this program has" 3 'WORLD_SIZE.*2' env RANK=0 WORLD_SIZE=2 "$expar" check 'smoke*'
check "Open MPI without a rank" 3 'OMPI_COMM_WORLD_RANK: missing' env OMPI_COMM_WORLD_SIZE=2 "$expar" version
check "a Slurm batch script" 0 'expar' env SLURM_PROCID=0 "$expar" version
check "two launchers that disagree" 3 'rank 0 of 1.*rank 1 of 2' env RANK=0 WORLD_SIZE=1 OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 "$expar" version

# ---- plugins
check "plugin without a slash" 2 "has no '/'" "$expar" check 'residual T=4' --impl plugin:null.so
check "plugin that is not there" 4 'nosuch.so' "$expar" check 'residual T=4' --impl plugin:./nosuch.so
check "plugin of another abi" 12 'abi [0-9]+, this program' "$expar" check 'residual T=4' --impl "plugin:$build/plugin/broken_abi.so"
check "plugin of another size" 12 'size [0-9]+, expected' "$expar" check 'residual T=4' --impl "plugin:$build/plugin/broken_size.so"
check "plugin that returns NULL" 12 'NULL' "$expar" check 'residual T=4' --impl "plugin:$build/plugin/broken_null.so"
check "plugin with a foreign stage" 12 'row 0' "$expar" check 'residual T=4' --impl "plugin:$build/plugin/broken_row.so"
check "plugin without the symbol" 12 'xp_plugin' "$expar" check 'residual T=4' --impl "plugin:$build/plugin/broken_symbol.so"
check "plugin with a name that is taken" 12 "name 'ref' is taken" "$expar" check 'residual T=4' --impl "plugin:$build/plugin/broken_name.so"
check "plugin with another device" 12 'device abi' "$expar" check 'residual T=4' --impl "plugin:$build/plugin/broken_device.so"
check "plugin that needs more than there is" 12 'xp_not_in_the_contract' "$expar" check 'residual T=4' --impl "plugin:$build/plugin/broken_link.so"
check "plugin that is no library" 12 'text.json' "$expar" check 'residual T=4' --impl plugin:./text.json
check "plugin that is a folder" 12 'models' "$expar" check 'residual T=4' --impl plugin:./models
check "plugin with step" 12 'abi' "$expar" step --model ./good.json --impl "plugin:$build/plugin/broken_abi.so"
check "the template's one row" 0 'PASS 1 ' "$expar" check 'residual T=33 H=17' --impl "plugin:$build/plugin/null.so"
check "relations of the reference" 0 '^PASS [0-9]+ dialects, 0 failed: .* 0 do not hold, [0-9]+ have no such symmetry, 0 cannot run' "$expar" selftest relations
check "relations of a plugin, the rest by ref" 0 '^run by ref, for want of a row: router' "$expar" selftest relations --impl "plugin:$build/plugin/null.so"
check "relations of a row that looks at a token's place" 1 'tokens, real f32: y\[[0-9]+\]' "$expar" selftest relations --impl "plugin:$build/plugin/wrong.so"
check "a selftest that runs no backend" 2 '--impl: selftest dialects' "$expar" selftest dialects --impl dense
check "an unknown selftest" 2 "selftest: 'relation', expected dialects or relations" "$expar" selftest relation
check "the template's row, another dtype" 5 'UNSUPPORTED.*' "$expar" check 'residual T=33 H=17 dtype=bf16' --impl "plugin:$build/plugin/null.so"
check "a stage that the template has not" 5 'UNSUPPORTED' "$expar" check 'rmsnorm T=3 H=4' --impl "plugin:$build/plugin/null.so"

check "the repro line names the plugin" 5 "repro .*--impl plugin:$build/plugin/null.so" "$expar" check 'rmsnorm T=3 H=4' --impl "plugin:$build/plugin/null.so"
supported=0
for stage in $("$expar" list stages | awk 'NR > 1 { print $1 }'); do
    "$expar" check "$stage " --impl "plugin:$build/plugin/null.so" -q >out 2>err </dev/null
    code=$?
    [ $code -eq 0 ] && supported=$((supported + 1))
    [ $code -eq 0 ] || [ $code -eq 5 ] || result "the template and $stage" "exit $code: $(cat err out | head -n 1)"
done
[ $supported -eq 1 ] && result "the template has one stage" || result "the template has one stage" "it passes $supported"
if command -v gcc >/dev/null; then
    line=$(sed -n 's/^ \* *\(gcc .*\)/\1/p' "$source/tests/plugin/null.c")
    (cd "$source" && ${line/ mine.so/ $dir/mine.so}) 2>err
    check "the template builds by its own line" 0 'PASS 2 ' "$expar" check 'residual T=33 H=97 seed=1,2' --impl plugin:./mine.so
fi
missing=
nm -D --defined-only "$expar" | awk '{ print $3 }' | sort >symbols
for name in $(grep -hoE '^(extern )?[a-z].*[ *]xp_[a-z0-9_]+(\(|;|\[)' "$source"/harness/xp/*.h | grep -v '^typedef' |
    grep -oE 'xp_[a-z0-9_]+(\(|;|\[)$' | grep -oE '[a-z0-9_]+' | sort -u); do
    grep -qx "$name" symbols || [ "$name" = xp_plugin ] || missing="$missing $name"
    declared=$((${declared:-0} + 1))
done
[ -z "$missing" ] && [ "${declared:-0}" -gt 50 ] && result "all $declared names of the contract are lent" ||
    result "all names of the contract are lent" "${declared:-0} declared, missing:$missing"

# ---- output
check "results file" 0 'PASS' "$expar" check 'residual T=4 H=4' -J r.json
check "results are JSON" 0 'valid' bash -c "'$build/tests/jsonok' cases <r.json && echo valid"
check "results to nowhere" 11 'nowhere' "$expar" check 'residual T=4 H=4' -J nowhere/r.json
check "results to a folder" 11 'models' "$expar" check 'residual T=4 H=4' -J models
check "results of step to nowhere" 11 'nowhere' "$expar" step --model ./good.json --tokens 16 --steps 1 -J nowhere/r.json
[ -e models.tmp ] && result "no temporary file stays" "models.tmp" || result "no temporary file stays"
check "results of step" 0 'parameters sha256 [0-9a-f]{64}' "$expar" step --model ./good.json --tokens 16 --steps 1 -J s.json
check "results of step are JSON" 0 'valid' bash -c "'$build/tests/jsonok' digest <s.json && echo valid"
for what in list "plan --model ./good.json" "explain exit" version "check smoke/30" --help; do
    check "full disk: $what" 11 'standard output' bash -c "'$expar' $what >/dev/full"
    check "closed output: $what" 11 'standard output' bash -c "'$expar' $what >&-"
done
"$expar" check 'residual T=4 H=4' -J closed.json >&- 2>err
"$build/tests/jsonok" cases <closed.json && result "a closed output does not spoil the results" || result "a closed output does not spoil the results" "no JSON"
check "a reader that left" 11 'standard output' bash -c "set -o pipefail; { sleep 0.2; '$expar' list; } | true"
for what in list 'list faults kernels' 'plan --model ./good.json' 'plan --model ./good.json --mesh sim:dp=2,fsdp=4,ep=4' 'explain dispatch' \
    'explain scatter' 'explain grad-times-ep' 'explain qwen3-30b-a3b' 'explain hf-5.24/mixtral' 'explain real' 'explain PASS' 'explain exit' 'explain 4'; do
    if "$expar" $what --json 2>err | "$build/tests/jsonok"; then
        result "JSON of $what"
    else
        result "JSON of $what" "$(head -n 1 err)"
    fi
done
# What the text lists, the JSON lists.
for list in stages kernels backends meshes models dialects cases faults data; do
    lines=$("$expar" list $list | tail -n +2 | wc -l)
    names=$("$expar" list $list --json | grep -c '"name":')
    [ "$lines" -gt 0 ] && [ "$lines" -eq "$names" ] && result "list $list" || result "list $list" "$lines lines, $names names in JSON"
done
# Everything that a list names can be explained.
for list in stages models dialects faults data; do
    for name in $("$expar" list $list | awk 'NR > 1 { print $1 }'); do
        "$expar" explain "$name" >out 2>&1 || result "explain $name" "$(head -n 1 out)"
    done
done
mkdir odd && cp good.json "$(printf 'odd/\377.json')"
check "a name that JSON cannot hold" 4 'UTF-8' env EXPAR_MODELS="$dir/odd" "$expar" list models --json
check "unknown list" 2 "'stagse'" "$expar" list stagse
check "the width of a router in a layer" 0 '^R  .*router_in' "$expar" explain layer
check "unknown name to explain" 2 "'nosuch'" "$expar" explain nosuch
check "nothing to explain" 2 'one name' "$expar" explain
check "a wrong model to explain" 4 'torn.json' "$expar" explain ./torn.json
check "an exit code to explain" 0 'input file' "$expar" explain 4
"$expar" check 'residual T=4 H=4' >out 2>&1
grep -q $'\033' out && result "no colour into a file" "escapes in the output" || result "no colour into a file"
"$expar" check 'residual T=4 H=4' --color never >out 2>&1
grep -q $'\033' out && result "no colour when refused" "escapes in the output" || result "no colour when refused"
if command -v script >/dev/null; then
    for no in "" 1; do
        NO_COLOR=$no script -qec "'$expar' check 'residual T=4 H=4'" /dev/null >out 2>&1 </dev/null
        found=$(grep -q $'PASS\033\[0m\|\033\[32m' out && echo yes || echo no)
        [ $found = $([ -z "$no" ] && echo yes || echo no) ] && result "a terminal with NO_COLOR='$no'" ||
            result "a terminal with NO_COLOR='$no'" "colour: $found"
    done
fi
check "colour when asked for" 0 $'\033' "$expar" check 'residual T=4 H=4' --color always

echo "cli: $passed passed, $failed failed"
[ $failed -eq 0 ]
