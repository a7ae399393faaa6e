#!/bin/bash
# Two machines with eight GPUs each: sbatch examples/slurm.sh
# When submitted again, it resumes from the newest checkpoint. 120 seconds before its time limit, it
# saves, ends and requeues itself.
#SBATCH --job-name=sinklm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
source .venv/bin/activate

srun --kill-on-bad-exit=1 python -m sinklm.train pythia-1.4b \
    data.path=stores/pile \
    train.run_dir=runs/pythia-1.4b

# 143 = 128 + SIGTERM: stopped before the time limit, state saved
if [ $? -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
