#!/bin/bash
# Train a configuration with several seeds, and write its reference curves:
#   examples/reference.sh OUT.json SEEDS JOBS OPTIONS-OF-TRAIN.PY...
#   examples/reference.sh mine.json 5 1 --preset=digits --data=demo-out/digits.zip --kimg=100
# JOBS runs train at a time. After an interruption, the same command continues: complete runs stay
# as they are. The runs are in OUT.json.runs, which you can delete afterwards.
set -euo pipefail
out=$1 seeds=$2 jobs=$3
shift 3
if [ "$seeds" -lt 3 ]; then
    echo "SEEDS: got $seeds; give at least 3, better 5." >&2
    exit 2
fi
here=$(cd "$(dirname "$0")/.." && pwd)
train() {
    seed=$1 here=$2 out=$3
    shift 3
    python "$here/train.py" --outdir="$out.runs/seed-$seed" --seed="$seed" --resume=auto "$@"
}
export -f train
# An exit code of 255 would make xargs stop at once, with a less helpful message.
seq 0 $((seeds - 1)) |
    xargs -P "$jobs" -I %seed% bash -c 'train "$@" || exit 1' train %seed% "$here" "$out" "$@"
python "$here/fid.py" curves "$out.runs"/seed-*/0* --out="$out"
