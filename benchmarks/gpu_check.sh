#!/usr/bin/env bash
# Everything that a machine with GPUs must show, correctness first, then speed. usage: gpu_check.sh OUT_FOLDER [exact|train|speed ...]
set -uo pipefail
out=$1; shift
parts=${*:-exact kernels train speed}
mkdir -p "$out"
export PYTHONPATH=src PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
python3 -c 'import torch; print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.device_count())'
ringspan() { python3 -m ringspan.cli.main "$@"; }
over_nccl() { torchrun --nproc-per-node "$gpus" "$@"; }
case " $parts " in *" exact "*)
  over_nccl -m ringspan.cli.main verify --device cuda --dtype bfloat16,float32 --length 61,257,1000 --head-dim 64 --json "$out/verify_nccl.json"
  echo "verify over NCCL: $?"
  ringspan verify --device cuda --ranks 1,2,3,4,8 --dtype bfloat16,float32 --length 61,1000 --head-dim 64 --kernel auto,flash2 --json "$out/verify_one_gpu.json"
  echo "verify with in-process ranks on one GPU: $?"
esac
case " $parts " in *" kernels "*)
  python3 -m pytest -q tests/gpu -p no:cacheprovider 2>&1 | tail -30
  compute-sanitizer --tool memcheck python3 -m pytest -q tests/gpu -k fused_merge -p no:cacheprovider 2>&1 | tail -4
esac
case " $parts " in *" train "*)
  ringspan train --device cuda --ranks "$gpus" --dtype bfloat16 --steps 60 --context 8192 --out "$out/run"
  echo "train over NCCL: $?"
esac
case " $parts " in *" speed "*)
  # KERNELS, STRATEGIES and LENGTHS are lists with commas; BENCH holds more options, as in BENCH="--launch eager,graph --ablate".
  # shellcheck disable=SC2086
  ringspan bench --device cuda --kernel "${KERNELS:-auto}" --strategy "${STRATEGIES:-ring,all_gather,direct,ulysses,auto}" \
    --length "${LENGTHS:-2048,8192,32768,131072}" ${BENCH:-} --json "$out/speed.json" --markdown "$out/speed.md" --png "$out/speed.png"
  echo "bench: $?"
esac
