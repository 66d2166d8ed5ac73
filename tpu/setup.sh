#!/usr/bin/env bash
# Sets up this checkout on one host: a virtual environment in .venv with sdjax and what it needs.
#   tpu/setup.sh             on a TPU VM
#   EXTRA=cuda,gcs tpu/setup.sh  on a machine with NVIDIA GPUs; EXTRA=dev on any other
# PYTHON names the interpreter; where that is older than 3.11, as on TPU VMs, uv brings one.  SHARED=HOST:/FOLDER is
# mounted at shared/ over NFS: all hosts write checkpoints, so a run on several needs a folder that all of them see, or a
# bucket (--out gs://..., which the extra gcs is for).
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "${SHARED:-}" ] && ! mountpoint -q shared; then
  mkdir -p shared
  sudo mount -t nfs "$SHARED" shared
fi
python=${PYTHON:-python3}
if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  "$python" -m venv .venv
else
  "$python" -m pip install --quiet --user uv
  "$python" -m uv venv --quiet --seed --python 3.12 .venv
fi
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet --editable ".[${EXTRA:-tpu,gcs}]"
.venv/bin/sdjax methods >.venv/methods.txt
echo "setup.sh: $(hostname) is ready"
