#!/usr/bin/env bash
# The main job on a model small enough for the repository: inspect it, prune it to half its experts and quantize the
# rest to 4 bits in one pass, prove the result, measure what that cost, load it and let it write.
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
manifest=manifests/small-moe-keep8.json

step() {
    printf '\n$ shardxform %s\n' "$*"
    .venv/bin/shardxform "$@"
}

shard_bytes() { cat "$1"/*.safetensors | wc -c | tr -d ' '; }

scripts/venv.sh demo
mkdir -p "$(dirname "$out")"
step inspect "$source_dir"
step quantize "$source_dir" "$out" --manifest "$manifest" --format compressed-tensors --quiet
step verify "$out" --source "$source_dir" --quiet
step evaluate "$out" --against "$source_dir" --data "$source_dir/text/heldout.jsonl" --samples 8 --seqlen 256 \
    --work "$out.work" --quiet
printf '\n$ python examples/generate.py %s\n' "$out"
.venv/bin/python examples/generate.py "$out"

cat <<END

Done: $(shard_bytes "$source_dir") bytes of shards before, $(shard_bytes "$out") after, in $out.

What next:
  .venv/bin/shardxform inspect SRC                               what your own checkpoint is made of
  .venv/bin/shardxform quantize SRC OUT -m KEEP.json --dry-run   what would be written, before it is
  .venv/bin/shardxform prune SRC OUT -m KEEP.json                the same in 16 bits
  docs/scoring.md                                                how to find out which experts to keep
  scripts/test.sh                                                all tests
END
