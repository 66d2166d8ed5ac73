#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice; everything after the script's name goes to `sdjax train`.
#   export TPU=mine ZONE=us-west4-a SLICE=v5litepod-32 VERSION=v2-alpha-tpuv5-lite OUT=gs://my-bucket/runs/mine
#   tpu/launch.sh experiments/chain_sum.py --method sdpo
# OUT is the run's folder, as --out is: in a bucket that the slice's service account may write; no disk is shared then.
# Otherwise all hosts must see it: SHARED=10.0.0.2:/runs is mounted at shared/, and --out shared/mine lies there.
# The slice is made if there is none of this name, and kept afterwards:
#   gcloud compute tpus tpu-vm delete mine --zone us-west4-a
# Each host's output lands in LOGS (tpu-logs/), one file per host.  Ctrl-C and SIGTERM reach the run, which saves; go on
# by adding --resume.  If this machine loses its connection, the run goes on without it.
set -euo pipefail
: "${TPU:?set TPU to the name of the slice}"
: "${ZONE:?set ZONE to the zone of the slice, such as us-west4-a}"
: "${1:?name an experiment: tpu/launch.sh experiments/chain_sum.py ...}"
if [ -n "${OUT:-}" ]; then
  set -- "$@" --out "$OUT"
fi
checkout=$(cd "$(dirname "$0")/.." && pwd)
logs=${LOGS:-tpu-logs}
mkdir -p "$logs"

vm() { gcloud compute tpus tpu-vm "$1" "$2" --zone "$ZONE" "${@:3}"; }

if ! vm describe "$TPU" >/dev/null 2>&1; then
  : "${SLICE:?there is no slice $TPU in $ZONE: set SLICE to make one, such as v5litepod-32}"
  : "${VERSION:?set VERSION to its image: v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e}"
  vm create "$TPU" --accelerator-type "$SLICE" --version "$VERSION"
fi

# What git knows or would know: no runs, no environments.
archive=$(mktemp --suffix .tar.gz)
trap 'rm -f "$archive"' EXIT
(cd "$checkout" && git ls-files -z --cached --others --exclude-standard) |
  tar -C "$checkout" --null --files-from - --ignore-failed-read -czf "$archive"
vm scp "$archive" "$TPU:sdjax.tar.gz" --worker all
vm ssh "$TPU" --worker all --command \
  "mkdir -p sdjax && tar -C sdjax -xzf sdjax.tar.gz && SHARED='${SHARED:-}' PYTHON='${PYTHON:-python3}' sdjax/tpu/setup.sh"

# The run is no child of the connection: its output goes to a file, which the connection reads.
run="cd sdjax; nohup .venv/bin/sdjax train $(printf '%q ' "$@") --processes auto >train.log 2>&1 & echo \$! >train.pid"
follow='tail -n +1 --pid $! -F train.log; wait $!'
stop() {
  echo "launch.sh: asking the run to save and end" >&2
  vm ssh "$TPU" --worker 0 --command 'kill -TERM "$(cat sdjax/train.pid)"' </dev/null ||
    echo "launch.sh: it could not be told" >&2
}
trap stop INT TERM
vm ssh "$TPU" --worker all --output-directory "$logs" --command "$run; $follow" </dev/null &
status=0
wait $! || status=$?
# A signal ends the waiting, not the run.
while kill -0 $! 2>/dev/null; do
  status=0
  wait $! || status=$?
done
echo "launch.sh: ended with status $status; the output of host 0 is in $logs/0.log" >&2
exit "$status"
