#!/bin/bash
# Train on two nodes of eight GPUs each, for longer than the time limit: five minutes before it, the
# job saves a state, stops and requeues itself; when it starts again, it continues from that state.
# Submit it from the project's folder: sbatch examples/slurm.sh
#SBATCH --job-name=ffhq64 --output=%x-%j.log --open-mode=append
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=32
#SBATCH --time=24:00:00 --signal=USR1@300 --requeue
set -euo pipefail
source .venv/bin/activate
OUTDIR=runs/ffhq64 # A folder that only this job uses.
rm -f "$OUTDIR"/*/requeue
HOSTS=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
# After a stop, torchrun exits with an error; the file "requeue" says whether to continue.
# The job step ends only when the last state is written.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" examples/train_and_wait.sh "$OUTDIR" \
    torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --rdzv_backend=c10d \
    --rdzv_endpoint="${HOSTS[0]}:29500" --rdzv_id="$SLURM_JOB_ID" \
    --signals-to-handle=SIGTERM,SIGUSR1 \
    train.py --outdir="$OUTDIR" --data=datasets/ffhq64.zip --preset=ffhq64 \
    --precision=bf16 --compile --resume=auto || failed=$?
if compgen -G "$OUTDIR/*/requeue" > /dev/null; then
    scontrol requeue "$SLURM_JOB_ID"
else
    exit "${failed:-0}"
fi
