#!/bin/bash
# Two machines with eight GPUs each:
#     sbatch examples/slurm.sh pythia-1.4b data.path=stores/pile train.run_dir=runs/pythia-1.4b
# Five minutes before its time limit, the run saves and ends with status 75, and the job requeues
# itself. The run then resumes from the newest checkpoint, until all steps are done.
#SBATCH --job-name=sinklm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
source .venv/bin/activate
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over from sbatch

srun --kill-on-bad-exit=0 --wait=60 python -m sinklm.train "$@"
status=$?
if [ $status -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $status
