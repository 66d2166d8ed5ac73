#!/usr/bin/env bash
# Trains on GPU nodes under Slurm, one process per GPU; everything after the script's name goes to `sdjax train`.
#   sbatch --nodes 2 tpu/slurm.sh experiments/chain_sum.py --method sdpo --out runs/mine
# Five minutes before its time is up the run is told to save; the job then queues again and goes on with --resume.
# The checkout, its .venv (EXTRA=cuda,gcs tpu/setup.sh) and --out lie on a disk that all nodes see; --out, or OUT=...
# before sbatch, may be in a bucket instead (gs://...).
#SBATCH --job-name=sdjax
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
: "${SLURM_JOB_ID:?start this with sbatch}"
: "${1:?name an experiment: sbatch tpu/slurm.sh experiments/chain_sum.py --out runs/mine ...}"
case " $* " in
  *" --out "*) ;;
  *) [ -z "${OUT:-}" ] || set -- "$@" --out "$OUT" ;;
esac
case " $* " in
  *" --out "*) ;;
  *) echo "slurm.sh: name the run's folder with --out: a job that goes on must find it" >&2; exit 2 ;;
esac
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && set -- "$@" --resume

# When a job is preempted the shell hears of it, too, and must wait for the run.
trap : TERM
status=0
srun .venv/bin/sdjax train "$@" --processes auto || status=$?
if [ "$status" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
