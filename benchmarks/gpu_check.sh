#!/usr/bin/env bash
# Everything that a machine with GPUs must show, each part within its seconds; all files of a call are in one archive, renewed after each
# bench, step and part, and where SIGTERM ends it.
# SHARE=1: every bench also times one device with its share of the heads alone. LAYOUT=zigzag,weighted: in these layouts, where a part names none.
# Several of these run side by side, each on GPUs of its own: CUDA_VISIBLE_DEVICES=2,3 gpu_check.sh ...
# usage: gpu_check.sh OUT_FOLDER [exact|ranks|units|sanitizer|correct|queues|speed|eager|many|many_heads|many_narrow|stages|long|masks|heads|auto|ablate|memory|soak|
#   steps|account|parts|reach|alone|host|timeline|run|half_million|million ...]
set -uo pipefail
kept=$1; shift
parts=${*:-exact ranks units sanitizer correct speed long masks heads auto ablate soak steps}
out=$(mktemp -d)
mkdir -p "$kept"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
visible=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}
# torchrun's own port is one for the whole machine.
export PET_MASTER_PORT=$((29500 + ${visible%%,*}))
python3 -c 'import torch; print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.device_count())'
kernel=${KERNEL:-flash4}
# FlashAttention-4 compiles for 15 s for each kind of tile: once on a machine, not once in each of these processes.
export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 FLASH_ATTENTION_CUTE_DSL_CACHE_DIR=${FLASH_ATTENTION_CUTE_DSL_CACHE_DIR:-/tmp/flash4_kernels}
# keep: renews the archive; who reads it finds the old one or the new one, whole.
keep() {
  tar czf "$kept/.${parts// /-}.partial" --exclude 'checkpoint*' -C "$out" . && mv "$kept/.${parts// /-}.partial" "$kept/${parts// /-}.tgz"
}
# bash answers a signal while it waits for what runs beside it, and not before what runs in front has ended.
trap 'kill $(jobs -p) 2> /dev/null; wait; keep; exit 143' TERM
# Rows of tables and verdicts alone; everything is in the files.
bench() {
  local name=$1 seconds=$2; shift 2
  timeout "$seconds" python3 -m ringspan.cli.main bench --device cuda --one-device "$kernel" --json "$out/$name.json" \
    --samples "${SAMPLES:-20}" ${SHARE:+--share} ${LAYOUT:+--layout "$LAYOUT"} --markdown "$out/$name.md" --png "$out/$name.png" "$@" > "$out/$name.log" 2>&1 &
  wait $!
  echo "bench $name: $?"
  grep -E '^(ring|direct|all_gather|ulysses|pass_query|auto|one device|rfa|yunch|pytorch|error|ended|passed|refused|wrong|failed)|tokens a device on|the heads alone' "$out/$name.log" | cut -c1-150
  keep
}
# step SECONDS ARGUMENTS: whole training steps; the line without its settings.
step() {
  local seconds=$1; shift
  timeout "$seconds" torchrun --nproc-per-node "${GPUS:-$gpus}" benchmarks/training_step.py --json "$out/steps.jsonl" "$@" > "$out/step.log" 2>&1 &
  wait $!
  local status=$?
  cat "$out/step.log" >> "$out/steps.log"
  echo "step $*: $status"
  if grep -q '^{' "$out/step.log"; then
    grep '^{' "$out/step.log" | python3 -c 'import json, sys
for text in sys.stdin:
    line = json.loads(text)
    print({k: line.get(k) for k in ("context", "seconds", "forward_and_backward_seconds", "losses", "mfu", "peak_gib", "reserved_gib", "host_gib_by_rank", "out_of_memory") if k in line})'
  else
    grep -vE '^(W|\[rank|\*|$)' "$out/step.log" | tail -6 | cut -c1-300
  fi
  keep
}
for part in $parts; do
  began=$SECONDS
  case $part in
    exact)
      timeout 120 torchrun --nproc-per-node "$gpus" -m ringspan.cli.main verify --device cuda --dtype bfloat16,float32 --length 61,1000 --head-dim 64 \
        --most 160 --json "$out/verify.json" 2>&1 | tail -4
      timeout 120 python3 -m ringspan.cli.main train --device cuda --ranks "$gpus" --dtype bfloat16 --steps 60 --context 8192 --out "$out/run" 2>&1 | tail -8
      rm -rf "$out"/run*/checkpoint* ;;
    ranks)
      # What is run by ranks with a GPU each, or asks for two; the rest of tests/gpu needs one GPU.
      timeout 300 python3 -m pytest -q tests/gpu/test_cuda_links.py tests/gpu/test_cuda_replay.py tests/gpu/test_cuda_tensor_parallel.py \
        -p no:cacheprovider -p no:benchmark > "$out/ranks.log" 2>&1
      grep -E 'Error:|assert ' "$out/ranks.log" | sort | uniq -c | head -20; tail -12 "$out/ranks.log" ;;
    units)
      # On one GPU.
      timeout 300 python3 -m pytest -q tests/gpu -n 8 -p no:cacheprovider -p no:benchmark --durations 8 > "$out/gpu_tests.log" 2>&1 & wait $!
      echo "tests/gpu: $?"; tail -25 "$out/gpu_tests.log" ;;
    sanitizer)
      # The kernels written here, on one GPU.
      for tool in memcheck racecheck; do
        timeout 120 compute-sanitizer --tool $tool python3 -m pytest -q tests/gpu/test_cuda_kernels.py \
          tests/gpu/test_cuda_transformer.py -k "fused_merge or fused_sums or fused_norms or (fused_token_loss and 4096)" -p no:cacheprovider
      done > "$out/sanitizer.log" 2>&1 & wait $!
      echo "sanitizer: $?"; grep -E '=====.*(SUMMARY|ERROR|Error)|passed|failed' "$out/sanitizer.log" | tail -12 ;;
    correct)
      for how in "--shard-parameters" "--parameters-on-host --offload" "--shard $gpus --accumulate 2" "--tensor $gpus"; do
        # shellcheck disable=SC2086
        timeout 90 python3 -m ringspan.cli.main train --device cuda --ranks "$gpus" --dtype bfloat16 --steps 20 --context 4096 --sample-tokens 0 \
          --out "$out/run $how" $how > "$out/train.log" 2>&1
        echo "train $how: $? $(grep -a 'held-out loss\|error' "$out/train.log" | tail -1)"
      done
      rm -rf "$out"/run*/checkpoint*
      timeout 60 python3 -m ringspan.cli.main doctor 2>&1 | tail -30
      timeout 90 torchrun --nproc-per-node "$gpus" -m ringspan.cli.main trace ring --device cuda --length 65536 --heads 32 --kv-heads 8 --head-dim 128 \
        --png "$out/trace.png" --chrome "$out/trace.chrome.json" --json "$out/trace.json" 2>&1 | tail -25 ;;
    queues)
      # A captured pass has as many branches as a GPU has hardware queues by default, and ends with one queue too.
      for connections in 8 1 32; do
        export CUDA_DEVICE_MAX_CONNECTIONS=$connections
        bench "queues_$connections" 80 --kernel "$kernel" --strategy direct:shards_at_once=4,all_gather,ulysses,ulysses:stages=4,ring --length 2048 --heads 32/32 --launch graph --peers none
      done
      unset CUDA_DEVICE_MAX_CONNECTIONS ;;
    speed) bench speed 300 --kernel "$kernel" --strategy "${STRATEGIES:-ring}" --length 2048,8192,32768 \
        --launch "${LAUNCH:-graph,eager,replay}" ;;
    many)
      # What four GPUs and more choose among.
      SAMPLES=10 bench many 500 --kernel "$kernel" --strategy "${STRATEGIES:-ring,direct:shards_at_once=2,direct:shards_at_once=4,all_gather,auto}" \
        --length "${LENGTHS:-2048,8192,32768}" --launch graph --peers "${PEERS:-yunchang_ulysses,pytorch_alltoall,pytorch_allgather}" ;;
    many_heads)
      SAMPLES=${SAMPLES:-10} bench many_heads 300 --kernel "$kernel" --strategy "${STRATEGIES:-auto,all_gather,ulysses,two_dimensional}" --length "${LENGTHS:-2048,8192,32768}" --heads "${HEADS:-64/8,32/32}" --launch graph --peers none ;;
    many_narrow)
      SAMPLES=${SAMPLES:-10} bench many_narrow 150 --kernel "$kernel" --strategy "${STRATEGIES:-auto,direct:shards_at_once=4,ulysses}" --length "${LENGTHS:-2048,8192,32768}" --head-dim 64 --launch graph --peers none ;;
    stages)
      # Heads in stages beside all at once, and where the time of the stages goes.
      SAMPLES=${SAMPLES:-10} bench stages 240 --kernel "$kernel" --strategy ulysses:stages=1,ulysses:stages=2,ulysses:stages=4 \
        --length 2048,8192,32768 --heads "${HEADS:-32/32}" --launch graph --peers none ;;
    long) SAMPLES=10 bench long 560 --kernel "$kernel" --strategy "${STRATEGIES:-ring}" --length 131072 --heads "${HEADS:-32/8}" --head-dim "${HEAD_DIM:-128}" \
        --launch "${LAUNCH:-eager}" --warmup 1 --peers "${PEERS:-none}" ;;
    eager)
      # What is launched from Python, with and without graphs of attention's own.
      bench eager 120 --kernel "$kernel" --strategy "${STRATEGIES:-ring}" --length 1024,2048,4096 --launch graph,eager,replay ;;
    masks)
      bench window 90 --kernel "$kernel" --strategy direct,auto --layout contiguous,auto --length 65536 --mask window:4095 --launch graph --peers none
      bench documents 90 --kernel "$kernel" --strategy direct,auto --layout contiguous,auto --length 65536 --documents realistic:1 --launch graph --peers none ;;
    heads)
      bench heads 220 --kernel "$kernel" --strategy ring --length 2048,8192,32768 --heads "${HEADS:-64/8,32/32}" --launch graph --peers none
      bench narrow 60 --kernel "$kernel" --strategy ring --length 2048,8192,32768 --head-dim 64 --launch graph --peers none ;;
    auto)
      bench strategies 240 --kernel "$kernel" --strategy ring,all_gather,direct,ulysses,auto --layout zigzag,auto --length 2048,8192,32768 --launch graph --peers none
      bench kernels 150 --kernel "flash4,cudnn,flash2,auto" --strategy ring --length 2048,8192,32768 --launch graph --peers none ;;
    ablate) bench ablation 120 --kernel "$kernel" --strategy ring --length 8192,32768 --ablate --peers none ;;
    memory)
      # What holds more at a time than a ring does.
      bench memory 120 --kernel "$kernel" --strategy ulysses,ring,ring:kv_heads_per_stage=1 --length 8192,32768 --peers none ;;
    soak) timeout 150 torchrun --nproc-per-node "$gpus" benchmarks/soak.py --steps "${STEPS:-1000}" 2>&1 | grep -v -i warn | tail -4 ;;
    steps)
      export OMP_NUM_THREADS=14 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
      step 240 --context 32768 --offload --steps 3
      step 240 --context 131072 --offload --steps 2 ;;
    account)
      # Where the time of a step goes, by kind of kernel, on an 8B shape of fewer layers.
      export OMP_NUM_THREADS=14 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
      step 120 --layers 4 --context "${CONTEXT:-32768,131072}" --offload --steps 2 --profile
      grep -E ' ms +(attention|matrix products|messages|copies|fills|waits|elementwise|nothing), of' "$out/step.log" ;;
    parts)
      # What each part is worth in the whole 8B shape: the context that fits without it and what it costs. WAYS names some, to split them over GPUs.
      export OMP_NUM_THREADS=14 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
      all=";--without feed_forward;--without tiled_loss;--without rematerialise;--rematerialise full;--without offload;--without overlap;--plain"
      IFS=';' read -ra ways <<< "${WAYS-$all}"
      for how in "${ways[@]}"; do
        # shellcheck disable=SC2086
        step 240 --layers "${LAYERS:-32}" --context "${CONTEXT:-8192,16384,32768,65536,131072}" --gpu-gib "${GPU_GIB:-76}" --offload --steps 1 $how
      done ;;
    reach)
      # What plain transformers, FSDP2 and gradient checkpointing reach with the same model on the same GPUs.
      export OMP_NUM_THREADS=14 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
      step 240 --plain --context 4096,8192,16384,32768 --gpu-gib "${GPU_GIB:-76}" --steps 1 ;;
    alone)
      # How far one GPU goes.
      export OMP_NUM_THREADS=14 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
      GPUS=1 step 400 --context "${CONTEXT:-262144}" --gpu-gib "${GPU_GIB:-76}" --rematerialise full --offload --host-gib "${HOST_GIB:-70}" --parameters-on-host --warmup 0 --steps 1 ;;
    host)
      # Where the host's time goes at short lengths.
      timeout 90 torchrun --nproc-per-node "$gpus" benchmarks/kernel_times.py --lengths 2048 --kernel "$kernel" --python 2>&1 | grep -E '^ |heads' | cut -c1-150 ;;
    timeline)
      timeout 120 torchrun --nproc-per-node "$gpus" benchmarks/kernel_times.py --lengths "${LENGTHS:-32768}" --kernel "$kernel" --graph --timeline \
        --heads "${HEADS:-32/8}" --head-dim "${HEAD_DIM:-128}" \
        --strategies "${STRATEGIES:-ring,direct:shards_at_once=4}" > "$out/timeline.log" 2>&1
      echo "timeline: $?" ;;
    run)
      # The context is used, not just held: the loss of the same held-out tokens by context, after some hundred steps on a real text, by default
      # the source of transformers' models, where much of a file was said some ten thousand bytes before. A pretrained model, stretched:
      #   MODEL=SmolLM2-135M TRAIN="--rope-scaling yarn --learning-rate 2e-4" STEPS=200 HELD_OUT=524288 gpu_check.sh out run
      # Ids of every_position.py hold the same held-out text at many positions: DATA=ids.npy HELD_OUT=<what it printed>.
      data=${DATA:-$(python3 -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("transformers").origin).parent / "models")')}
      # shellcheck disable=SC2086
      timeout "${SECONDS_ALLOWED:-280}" python3 -m ringspan.cli.main train --device cuda --ranks "$gpus" --dtype bfloat16 --model "${MODEL:-tiny}" \
        --context 65536 --steps "${STEPS:-1000}" --data "$data" --validation-tokens "${HELD_OUT:-2097152}" --validation-every 100 --sample-tokens 0 \
        --out "$out/long_run" ${TRAIN:-} 2>&1 | tail -12
      rm -rf "$out"/long_run/checkpoint* "$out"/long_run/tokens ;;
    half_million)
      # Float32 masters and states, 128 GB, and half of the checkpoints fill the host; the other checkpoints stay on the GPUs.
      export OMP_NUM_THREADS=14 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
      step "${SECONDS_ALLOWED:-560}" --context 524288 --gpu-gib "${GPU_GIB:-76}" --rematerialise full --offload --host-gib "${HOST_GIB:-36}" --parameters-on-host --warmup 0 --steps 1 --progress ;;
    million)
      # Longer than one call may take on some machines: `setsid` it, and look at steps.log.
      export OMP_NUM_THREADS=14 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
      step "${SECONDS_ALLOWED:-1600}" --context 1048576 --gpu-gib "${GPU_GIB:-76}" --rematerialise full --layers-per-checkpoint 2 \
        --offload --host-gib "${HOST_GIB:-56}" --kv-heads-per-stage 4 --parameters-on-host --warmup 0 --steps 1 --progress ;;
  esac
  echo "== $part: $((SECONDS - began)) s"
  keep
done
