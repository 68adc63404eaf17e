#!/usr/bin/env bash
# The experiments that docs/results.md still lacks, on one GPU:
#
#     bash docs/programme.sh CHECKPOINT [FLAG...]      # FLAG: of suite.py, as --data-dir /data
#
# Several processes share out the runs of each command. What is finished is skipped, so that the same
# command goes on after an interruption. PROCESSES=12 and OUT=runs/programme are the defaults, and
# PARTS="rank long" makes these parts alone. On an H200 it should take some six minutes: see "What is
# to be run next" in docs/results.md.
# Each part ends in OUT/<part>/runs.csv, to be kept as results/<part>.csv, and in OUT/<part>.txt,
# its table. Rehearsal on a CPU, one epoch of the demo for each run: DRY=1 bash docs/programme.sh
set -euo pipefail
cd "$(dirname "$0")/.."
processes=${PROCESSES:-12} out=${OUT:-runs/programme}
all="main regularisers rank long ablations pixels"
read -ra parts <<< "${PARTS:-$all}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

suite() {  # part, pixels, epochs, flags
    local part=$1 size=(--img-size "$2" --epochs "$3")
    shift 3
    if [[ " ${parts[*]} " != *" $part "* ]]; then
        return
    fi
    if [ -n "${DRY:-}" ]; then
        size=(--dataset digits --model vit_nano --img-size 14 --epochs 1)
    fi
    python suite.py "${real[@]}" "$@" "${size[@]}" --out "$out/$part"
}

programme() {
    local both=(--dataset cifar caltech101) rates=(--lr 2e-3 4e-3 8e-3 --choose lr)
    local two=(--search-seed 0 1) three=(--search-seed 0 1 2)
    local five=(--seed 0 1 2 3 4) tuned=("${rates[@]}" --search-seed 0 1 --seed 0 1 2)

    # --- is MLAE ahead of LoRA, and are masks the reason? 88 runs ---
    suite main 98 20 "${both[@]}" --method linear lora mlae --mask-prob 0 0.5 \
        "${rates[@]}" "${two[@]}" "${five[@]}"

    # --- does LoRA with a regulariser of its own do as well? 196 runs ---
    local lora=("${both[@]}" --method lora "${rates[@]}" "${three[@]}" "${five[@]}")
    suite regularisers 98 10 "${lora[@]}" --method mlae
    suite regularisers 98 10 "${lora[@]}" --lora-dropout 0 0.1 0.3
    suite regularisers 98 10 "${lora[@]}" --drop-path 0.1
    suite regularisers 98 10 "${lora[@]}" --weight-decay 1e-2
    suite regularisers 98 10 "${lora[@]}" --label-smoothing 0.1

    # --- the paper's claim: masks let the rank grow. 36 runs, and 18 with a longer schedule ---
    suite rank 98 20 --dataset cifar --rank 8 32 --mask-prob 0 0.5 "${tuned[@]}"
    suite long 98 50 --dataset cifar --method lora mlae "${tuned[@]}"

    # --- the paper's ablations: depth, amount, kind of masks, lambda, layers. 108 runs ---
    local mlae=(--dataset cifar --method mlae "${tuned[@]}")
    suite ablations 98 20 "${mlae[@]}" \
        --mask-pattern random incremental decremental hourglass protruding
    suite ablations 98 20 "${mlae[@]}" --mask-prob 0.3 0.7
    suite ablations 98 20 "${mlae[@]}" --masking fixed mixed
    suite ablations 98 20 "${mlae[@]}" --freeze-lambda
    suite ablations 98 20 "${mlae[@]}" --targets attn.qkv,mlp.fc1 attn.qkv,attn.proj,mlp.fc1,mlp.fc2

    # --- more pixels: 18 runs ---
    suite pixels 224 20 --dataset cifar --method lora mlae "${tuned[@]}"
}

if [ -n "${DRY:-}" ]; then
    real=()
else
    real=(--source prepared --model vit_small_patch14_dinov2 --checkpoint "${1:?the file of the backbone}" --amp bf16)
    shift
fi
real+=("$@")

for part in "${parts[@]}"; do
    if [[ " $all " != *" $part "* ]]; then
        echo "PARTS: there is no part $part; there are $all" >&2
        exit 2
    fi
done
mkdir -p "$out"
for number in $(seq "$processes"); do
    programme > "$out/process-$number.log" 2>&1 &
done
for number in $(seq "$processes"); do
    wait -n
done
for part in "${parts[@]}"; do
    python suite.py --table "$out/$part/runs.csv" --choose lr | tee "$out/$part.txt"
done
