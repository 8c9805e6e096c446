#!/bin/bash
# sbatch docs/slurm.sh -c opd:text/quickstart.yaml -c opd:trainer/hsdp.yaml --trainer.num_nodes=2 --trainer.default_root_dir=runs/mine
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# to this script alone, 300 s before the time limit or a preemption: longer than an optimizer step and a checkpoint take
#SBATCH --signal=B:TERM@300

again=0
trap 'again=1; kill -TERM "$run"' TERM

srun opd fit "$@" --ckpt_path=last &
run=$!
wait "$run"
code=$?
# a signal ends the first `wait` before the run has finished its step
while kill -0 "$run" 2>/dev/null; do
    wait "$run"
    code=$?
done

# 75: it hung, and said where; the same nodes may have to be left out (scontrol update ExcNodeList=…)
if [ "$again" = 1 ] || [ "$code" = 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
