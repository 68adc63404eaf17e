#!/usr/bin/env bash
# Prove and measure what is special on a GPU, in some minutes of an H200: bash docs/gpu.sh > gpu.txt
# It runs the tests that need CUDA, times steps eagerly and captured, and trains 1000 images for 100
# epochs both ways. Rehearsal on a CPU, small and without graphs: DRY=1 bash docs/gpu.sh
set -uo pipefail  # a step that fails does not stop the rest
cd "$(dirname "$0")/.."

names=(floor mlae two-branch lora peft full)
steps=(--batch-size 64 --amp bf16 --rounds 3 --steps 30)
base=(--model vit_base_patch16_224) small=(--model vit_small_patch14_dinov2 --img-size 98)
epochs=(--epochs 100)
if [ -n "${DRY:-}" ]; then
    steps=(--batch-size 2 --rounds 1 --steps 1 --images 8 --device cpu)
    base=(--model vit_nano --img-size 14) small=("${base[@]}") epochs=(--epochs 1 --device cpu)
else
    names+=("${names[@]/%/+graph}")
fi
all=(--targets attn.qkv attn.proj mlp.fc1 mlp.fc2)
run=("${base[@]}" "${epochs[@]}" --no-pretrained --lr 1e-3 --out "$(mktemp -d)")

set -x
nvidia-smi -L
python -m pytest -q -m cuda
python bench.py "${steps[@]}" "${base[@]}" --no-memory --methods "${names[@]}"
python bench.py "${steps[@]}" "${base[@]}" --no-memory --methods "${names[@]}" "${all[@]}"
python bench.py "${steps[@]}" "${small[@]}" --no-memory --methods "${names[@]}"
python bench.py "${steps[@]}" "${base[@]}" --methods floor mlae peft
python train.py "${run[@]}"
python train.py "${run[@]}" --graph off --seed 1
