#!/usr/bin/env bash
# Every ratio that attention is held to, on the two or four GPUs of one machine at one commit: parts of gpu_check.sh with the strategies that reach
# it, then what is right. 33 minutes: on four GPUs what takes two is measured on two pairs side by side. After each part OUT/NAME has its archive; at
# the end OUT/bars.md says what is short, and OUT/done is made.
# ONLY="narrow exact": these parts alone.
# usage: every_bar.sh OUT_FOLDER
set -uo pipefail
out=$1
check=$(dirname "$0")/gpu_check.sh
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
began=$SECONDS
mkdir -p "$out"
export SAMPLES=${SAMPLES:-10}
known=$(grep -v 'echo' "$0" | grep -oP '\bpart \K[a-z_]+(?= [a-z_]+( |$))' | sort -u | xargs)
for name in ${ONLY:-}; do
  [[ " $known " == *" $name "* ]] || { echo "no part is called '$name'; there are $known" >&2; exit 2; }
done
# part NAME PART: a part of gpu_check.sh, with what the variables before it say.
part() {
  [[ -z ${ONLY:-} || " $ONLY " == *" $1 "* ]] || return 0
  echo "## $((SECONDS - began)) s: $1"
  bash "$check" "$out/$1" "$2"
}

on_four() {
  LENGTHS=32768 HEADS=32/32 STRATEGIES=ulysses:stages=8 part ungrouped_long many_heads
  LENGTHS=32768 HEADS=64/8 STRATEGIES=all_gather,ulysses:stages=2 part many_queries_long many_heads
  LENGTHS=32768 STRATEGIES=all_gather,ulysses,ulysses:stages=2 part narrow_long many_narrow
  LENGTHS=32768 PEERS=pytorch_alltoall STRATEGIES=all_gather,auto part grouped_long many
  LENGTHS=2048,8192 STRATEGIES=direct:shards_at_once=2,all_gather,ulysses:stages=2,auto part grouped many
  LENGTHS=2048,8192 HEADS=64/8,32/32 STRATEGIES=direct:shards_at_once=4,ulysses:stages=4,auto part heads many_heads
  LENGTHS=2048,8192 STRATEGIES=direct:shards_at_once=4,all_gather,ulysses:stages=2,auto part narrow many_narrow
}
on_two() {
  LENGTHS=32768 HEADS=32/32 STRATEGIES=ulysses:stages=8,ulysses:stages=4,auto part ungrouped_long many_heads
  LENGTHS=32768 HEADS=64/8 STRATEGIES=all_gather,ulysses:stages=4,auto part many_queries_long many_heads
  LENGTHS=32768 STRATEGIES=all_gather,ulysses:stages=2,auto part narrow_long many_narrow
  LENGTHS=32768 PEERS=pytorch_alltoall,pytorch_allgather STRATEGIES=ring,all_gather,auto part grouped_long many
  LENGTHS=2048,8192 STRATEGIES=ring,direct,auto part grouped many
  LENGTHS=2048,8192 HEADS=64/8,32/32 STRATEGIES=ring,direct,auto part heads many_heads
  LENGTHS=2048,8192 STRATEGIES=ring,auto part narrow many_narrow
}
first_pair() {
  HEADS=32/8 STRATEGIES=ring part grouped_longest long
  HEADS=32/8 HEAD_DIM=64 STRATEGIES=ring part narrow_longest long
  HEADS=32/32 STRATEGIES=ring part ungrouped_longest long
}
second_pair() {
  HEADS=64/8 STRATEGIES=ulysses:stages=4 part many_queries_longest long
  part masks masks
  part soak soak
}

case $gpus in
  4)
    on_four
    export LAUNCH=graph
    CUDA_VISIBLE_DEVICES=0,1 first_pair > "$out/first_pair.log" 2>&1 &
    first=$!
    CUDA_VISIBLE_DEVICES=2,3 second_pair > "$out/second_pair.log" 2>&1 &
    wait "$first" $!
    cat "$out/first_pair.log" "$out/second_pair.log" ;;
  2)
    on_two
    export LAUNCH=graph
    first_pair
    second_pair ;;
  *)
    echo "two or four GPUs are measured, not $gpus: CUDA_VISIBLE_DEVICES=0,1,2,3 names four" >&2
    exit 2 ;;
esac

part exact exact
part ranks ranks
# What needs one GPU.
CUDA_VISIBLE_DEVICES=1 part units units > "$out/units.log" 2>&1 &
units=$!
CUDA_VISIBLE_DEVICES=0 part sanitizer sanitizer
wait "$units"
cat "$out/units.log"
echo "## $((SECONDS - began)) s: the end"
found=$(mktemp -d)
for archive in "$out"/*/*.tgz; do
  name=$(basename "$(dirname "$archive")")
  mkdir -p "$found/$name" && tar xzf "$archive" -C "$found/$name"
done
# Benches alone have ratios; what else was checked writes other files.
grep -l --null '"ratio_to_one_device"' "$found"/*/*.json | xargs -0 python3 "$(dirname "$0")/bars.py" | tee "$out/bars.md"
touch "$out/done"
