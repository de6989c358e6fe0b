#!/usr/bin/env bash
# The whole way on a model small enough for the repository: score its experts, keep half of them, heal the rest and tune
# their rounding to 4 bits, prove the result and measure it, draw it, write its model card, load it and let it write.
#
#   scripts/quickstart.sh [OUT]      OUT: directory to write, out/small-moe-8-w4a16 unless given
#
# Run it again and it goes on where it was interrupted, or says that OUT is complete.
set -euo pipefail
if [[ $# -gt 1 || ${1:-} == -* ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
out=${1:-out/small-moe-8-w4a16}
[[ $# -eq 0 || $out == /* ]] || out=$PWD/$out
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source_dir=examples/small-moe

step() {
    printf '\n$ shardxform %s\n' "$*"
    .venv/bin/shardxform "$@"
}

shard_bytes() { cat "$1"/*.safetensors | wc -c | tr -d ' '; }

scripts/venv.sh demo
mkdir -p "$(dirname "$out")"
step inspect "$source_dir"
step compress "$source_dir" "$out" --keep 8 --heal --heal-iters 60 --format compressed-tensors \
    --data "$source_dir/text/calib.jsonl" --samples 64 --seqlen 256 \
    --eval-data "$source_dir/text/heldout.jsonl" --eval-samples 32 --eval-seqlen 256 --plots
printf '\n$ python examples/generate.py %s\n' "$out"
.venv/bin/python examples/generate.py "$out"

cat <<END

Done: $(shard_bytes "$source_dir") bytes of shards before, $(shard_bytes "$out") after.

Look at:
  $out/README.md         the model card
  $out/saliency.png      which experts were worth keeping
  $out/evaluation.png    what each block lost

What next:
  docs/tutorial.md                                        the same, one step at a time
  docs/recipes.md                                         the same for a model of 35 billion parameters
  .venv/bin/shardxform inspect SRC                        what your own checkpoint is made of
  .venv/bin/shardxform compress SRC OUT ... --dry-run     what it would take, before anything is written
  scripts/test.sh                                         all tests
END
