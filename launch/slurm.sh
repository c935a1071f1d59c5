#!/bin/bash
# Any script of this project as a SLURM job, one process for each task (with a GPU each):
#
#     sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 launch/slurm.sh main_accumulation.py [arguments]
#     sbatch --array=1-18 --gpus=1 launch/slurm.sh experiment.py experiments/exp2.yaml    # each job has a run of the grid
#
# Submit it from the project's folder, with the virtual environment activated. Two minutes before its time limit, SLURM
# sends SIGTERM to this script, which passes it on. All processes finish their optimizer step, save and leave with exit
# code 143. Then the job is requeued and goes on from there. A job that is cancelled saves, too, and stays cancelled.
#
#SBATCH --job-name=imdb --time=02:00:00 --requeue --signal=B:TERM@120 --open-mode=append

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
[ -n "$SLURM_ARRAY_TASK_ID" ] && set -- "$@" --only "$SLURM_ARRAY_TASK_ID"

trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM    # to the tasks; srun itself would kill them

srun --kill-on-bad-exit=1 bash -c '
    [ "$SLURM_NTASKS" -gt 1 ] && export WORLD_SIZE=$SLURM_NTASKS RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    exec python "$@"' task "$@" &
wait $!
code=$?
if [ -n "$stopped" ]; then    # the trap has ended the first wait
    wait $!
    code=$?
    [ $code = 143 ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ] && scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
