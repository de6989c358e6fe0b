#!/usr/bin/env bash
# The main job on a model small enough for the repository: inspect, prune to half the experts, prove the result.
#
#   scripts/quickstart.sh [OUT]      OUT: directory to write, out/small-moe-8 unless given
#
# Run it again and it goes on where it was interrupted, or says that OUT is complete.
set -euo pipefail
if [[ $# -gt 1 || ${1:-} == -* ]]; then
    sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
out=${1:-out/small-moe-8}
[[ $# -eq 0 || $out == /* ]] || out=$PWD/$out
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source_dir=examples/small-moe
manifest=manifests/small-moe-keep8.json

step() {
    printf '\n$ shardxform %s\n' "$*"
    .venv/bin/shardxform "$@"
}

shard_bytes() { cat "$1"/*.safetensors | wc -c | tr -d ' '; }

scripts/venv.sh
mkdir -p "$(dirname "$out")"
step inspect "$source_dir"
step prune "$source_dir" "$out" --manifest "$manifest" --quiet
step verify "$out" --source "$source_dir" --quiet

cat <<END

Done: $(shard_bytes "$source_dir") bytes of shards before, $(shard_bytes "$out") after, in $out.

What next:
  .venv/bin/shardxform inspect SRC                            what your own checkpoint is made of
  .venv/bin/shardxform prune SRC OUT -m KEEP.json --dry-run   what would be written, before it is
  manifests/README.md                                         how to say which experts to keep
  scripts/test.sh                                             all tests
END
