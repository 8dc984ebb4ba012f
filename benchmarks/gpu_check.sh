#!/usr/bin/env bash
# Everything that a machine with GPUs must show, each part within its seconds.
# usage: gpu_check.sh OUT_FOLDER [exact|kernels|speed|long|masks|heads|soak|train ...]
set -uo pipefail
out=$1; shift
parts=${*:-exact kernels speed long masks heads soak train}
mkdir -p "$out"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
python3 -c 'import torch; print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.device_count())'
kernel=${KERNEL:-flash4}
over_nccl() { torchrun --nproc-per-node "$gpus" "$@"; }
# Rows of tables and verdicts alone; everything is in the files.
bench() {
  local name=$1 seconds=$2; shift 2
  timeout "$seconds" python3 -m ringspan.cli.main bench --device cuda --kernel "$kernel" --one-device "$kernel" --json "$out/$name.json" \
    --markdown "$out/$name.md" --png "$out/$name.png" "$@" 2>&1 | grep -E '^(ring|direct|auto|one device|rfa|yunch|pytorch|error|passed|refused|wrong|failed)|tokens a device on' | cut -c1-150
  echo "bench $name: ${PIPESTATUS[0]}"
}
for part in $parts; do
  began=$SECONDS
  case $part in
    exact)
      timeout 120 torchrun --nproc-per-node "$gpus" -m ringspan.cli.main verify --device cuda --dtype bfloat16,float32 --length 61,1000 --head-dim 64 \
        --most 160 --json "$out/verify.json" 2>&1 | tail -4 ;;
    kernels)
      timeout 240 python3 -m pytest -q tests/gpu -p no:cacheprovider 2>&1 | tail -15
      timeout 90 compute-sanitizer --tool memcheck python3 -m pytest -q tests/gpu -k "fused_merge_is" -p no:cacheprovider 2>&1 | tail -3 ;;
    speed) bench speed 300 --strategy ring --length 2048,8192,32768 --launch graph,eager ;;
    long) bench long 120 --strategy ring --length 131072 --peers none ;;
    masks)
      bench window 90 --strategy direct --layout contiguous --length 65536 --mask window:4095 --peers none
      bench documents 90 --strategy direct --layout contiguous,auto --length 65536 --documents realistic:1 --peers none ;;
    heads)
      bench heads 90 --strategy ring --length 8192,32768 --heads 64/8,32/32 --launch graph --peers none
      bench narrow 60 --strategy ring --length 8192,32768 --head-dim 64 --launch graph --peers none ;;
    soak) timeout 150 torchrun --nproc-per-node "$gpus" benchmarks/soak.py --steps "${STEPS:-1000}" 2>&1 | grep -v -i warn | tail -4 ;;
    train) timeout 120 python3 -m ringspan.cli.main train --device cuda --ranks "$gpus" --dtype bfloat16 --steps 60 --context 8192 --out "$out/run" 2>&1 | tail -6 ;;
  esac
  echo "== $part: $((SECONDS - began)) s"
done
