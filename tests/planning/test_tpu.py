"""The launchers in tpu/: their syntax, what they refuse, and whole runs whose cloud is this machine."""

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from whole_runs import kept_in, lines

from sdjax.planning.chips import TOPOLOGIES
from sdjax.run.storage import places

TPU = Path(__file__).parents[2] / "tpu"
SCRIPTS = sorted(TPU.glob("*.sh"))
SMOKE = ("tests/tiny_run.py", "--smoke")
CLIENTS = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "GOOGLE_AUTH_TOKEN_FOR_TESTING")

GCLOUD = """#!/usr/bin/env bash
# Two hosts: folders of this machine, found by jax as those of a TPU slice are.
echo "$@" >>"$CLOUD/calls"
verb=$4 target=$5 at="$CLOUD/local" worker=0
while [ $# -gt 0 ]; do
  case $1 in
    --worker) worker=$2 ;;
    --command) command=$2 ;;
    --output-directory) at=$2 ;;
    --accelerator-type) : >"$CLOUD/made" ;;
  esac
  shift
done
[ "$worker" = all ] && hosts="0 1" || hosts=$worker
case $verb in
  describe) [ -e "$CLOUD/made" ] ;;
  scp) for host in $hosts; do mkdir -p "$CLOUD/$host"; cp "$target" "$CLOUD/$host/sdjax.tar.gz"; done ;;
  ssh)
    for host in $hosts; do
      (cd "$CLOUD/$host" && TPU_WORKER_ID=$host exec bash -c "$command") >"$at/$host.log" 2>&1 &
      running="${running:-} $!"
    done
    status=0
    for one in $running; do wait "$one" || status=$?; done
    exit $status ;;
esac
"""

SRUN = """#!/usr/bin/env bash
# Two tasks on this machine; a signal to the step reaches them all.
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" >>"$CLOUD/task$task.log" 2>&1 &
  running="${running:-} $!"
done
trap 'kill -TERM $running' TERM
status=0
for one in $running; do
  wait "$one" || status=$?
  # A signal ends the waiting, not the task.
  while kill -0 "$one" 2>/dev/null; do status=0; wait "$one" || status=$?; done
done
exit $status
"""

PYTHON = f"""#!/usr/bin/env bash
# A new environment is this one, reading the package of the folder that it is called in.
[ "$1" = -c ] && exec {sys.executable} "$@"
[ "$1 $2" = "-m venv" ] || {{ echo "unexpected: $*" >&2; exit 1; }}
mkdir -p "$3/bin"
printf '#!/bin/sh\\nexit 0\\n' >"$3/bin/python"
printf '#!/bin/sh\\n[ "$1" = methods ] || exec {sys.executable} -m sdjax "$@"\\n' >"$3/bin/sdjax"
chmod +x "$3/bin/python" "$3/bin/sdjax"
"""


@pytest.fixture
def cloud(tmp_path, programs):
    """A folder for the cloud, and the environment in which its commands are found first."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "local").mkdir()
    for name, text in {"gcloud": GCLOUD, "srun": SRUN, "python-of-host": PYTHON}.items():
        (tmp_path / "bin" / name).write_text(text)
    (tmp_path / "bin" / "scontrol").write_text('#!/bin/sh\necho "$@" >>"$CLOUD/calls"\n')
    for file in (tmp_path / "bin").iterdir():
        file.chmod(0o755)
    own = {"CLOUD": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "COLUMNS": "100"}
    slice_ = {"TPU": "mine", "ZONE": "here", "SLICE": "v5litepod-32", "VERSION": "v2-alpha-tpuv5-lite"}
    rest = {"PYTHON": "python-of-host", "LOGS": str(tmp_path / "logs"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    # As on the hosts of a slice under GKE, and in a job of Slurm.
    found = {"JAX_FORCE_TPU_INIT": "1", "JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "localhost,localhost"}
    found |= {"MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
    port = free_port()
    job = {"SLURM_JOB_ID": str(port - 61440), "JAX_COORDINATOR_PORT": str(port)}
    return tmp_path, {**os.environ, **kept_in(programs), **own, **slice_, **rest, **found, **job}


def free_port() -> int:
    """A free port of those that jax takes under Slurm."""
    for port in range(61440 + os.getpid() % 4000, 65535):
        with socket.socket() as some:
            try:
                some.bind(("localhost", port))
                return port
            except OSError:
                continue
    raise AssertionError("no port is free")


def start(script: str, *arguments, environment, cwd=TPU.parent) -> subprocess.Popen:
    """Starts a script of tpu/ as a person does."""
    return subprocess.Popen(
        ["bash", str(TPU / script), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(script: str, *arguments, environment, cwd=TPU.parent) -> tuple[int, str]:
    """Exit status and output of a script."""
    process = start(script, *arguments, environment=environment, cwd=cwd)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


def logs(folder: Path) -> str:
    return "".join(f"== {file}\n{file.read_text()}" for file in sorted(folder.rglob("*.log")))


# ---- syntax -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_well_formed(script):
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)
    if shellcheck := shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        subprocess.run([shellcheck, "--severity=warning", script], check=True)


@pytest.mark.parametrize("name", ["TPU", "ZONE", "SLICE", "VERSION"])
def test_a_missing_variable_is_named(name, cloud):
    folder, environment = cloud
    environment.pop(name)
    status, output = run("launch.sh", *SMOKE, environment=environment)
    assert status != 0 and re.search(rf"{name}: .*set {name} to", output), output
    made = (folder / "calls").read_text() if (folder / "calls").exists() else ""
    assert "create" not in made and "ssh" not in made


def test_an_experiment_must_be_named(cloud):
    _, environment = cloud
    for script in ("launch.sh", "slurm.sh"):
        status, output = run(script, environment=environment)
        assert status != 0 and "name an experiment" in output
    status, output = run("slurm.sh", *SMOKE, environment=environment)
    assert status == 2 and "name the run's folder with --out" in output
    environment.pop("SLURM_JOB_ID")
    status, output = run("slurm.sh", *SMOKE, "--out", "x", environment=environment)
    assert status != 0 and "start this with sbatch" in output


# ---- a slice of Cloud TPUs --------------------------------------------------------------------------------------------


def launch(cloud, *arguments) -> subprocess.Popen:
    return start("launch.sh", *arguments, environment=cloud[1])


@pytest.mark.slow
def test_all_hosts_of_a_new_slice_train_together(cloud):
    folder, environment = cloud
    environment.pop("SLURM_JOB_ID")
    status, output = run("launch.sh", *SMOKE, "--out", folder / "run", environment=environment)
    assert status == 0, output + logs(folder)
    calls = (folder / "calls").read_text().splitlines()
    verbs = [call.removeprefix("compute tpus tpu-vm ").split()[0] for call in calls]
    assert verbs == ["describe", "create", "scp", "ssh", "ssh"]
    assert calls[1].endswith("create mine --zone here --accelerator-type v5litepod-32 --version v2-alpha-tpuv5-lite")
    assert [line["step"] for line in lines(folder / "run") if "evaluation" not in line] == [1, 2]
    first, second = ((folder / "logs" / f"{host}.log").read_text() for host in (0, 1))
    assert "run folder" in first and "run folder" not in second  # one of them speaks
    for host in (0, 1):
        copied = folder / str(host) / "sdjax"
        assert (copied / "sdjax/run/fit.py").exists() and not (copied / ".git").exists()


@pytest.mark.slow
def test_hosts_without_a_shared_disk_train_into_a_bucket(cloud, bucket):
    """Each host has its own copy of the checkout; OUT names the run's folder."""
    folder, environment = cloud
    environment.pop("SLURM_JOB_ID")
    environment |= {"OUT": bucket} | {name: os.environ[name] for name in CLIENTS}
    status, output = run("launch.sh", *SMOKE, environment=environment)
    assert status == 0, output + logs(folder)
    assert f"run folder {bucket}" in (folder / "logs" / "0.log").read_text()
    with places.to_read(places.place(bucket)) as copy:
        assert [line["step"] for line in lines(copy) if "evaluation" not in line] == [1, 2]
    assert not [path for host in "01" for path in (folder / host).rglob("metrics.jsonl")]


@pytest.mark.slow
def test_a_signal_saves_the_run_and_it_goes_on_on_the_same_slice(cloud):
    folder, environment = cloud
    environment.pop("SLURM_JOB_ID")
    arguments = ("tests/tiny_run.py", "--steps", "8", "--evaluate-every", "0", "--out", folder / "run")
    process = start("launch.sh", *arguments, environment=environment | {"TINY_SLOW": "0.05"})
    wait_for(lambda: len(lines(folder / "run")) >= 3, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 143, output + logs(folder)
    assert "saved; go on with --resume" in (folder / "logs" / "0.log").read_text()
    status, output = run("launch.sh", *arguments, "--resume", environment=environment)
    assert status == 0, output + logs(folder)
    assert [line["step"] for line in lines(folder / "run") if "evaluation" not in line] == list(range(1, 9))
    assert (folder / "calls").read_text().count("create") == 1


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- Slurm ------------------------------------------------------------------------------------------------------------


def submitted(folder: Path, script: str) -> Path:
    """A checkout in which the run is what `script` says."""
    (folder / ".venv/bin").mkdir(parents=True)
    program = folder / ".venv/bin/sdjax"
    program.write_text(f"#!/usr/bin/env bash\n{script}\n")
    program.chmod(0o755)
    return folder


def test_a_job_that_was_told_to_save_queues_again(cloud, tmp_path):
    folder, environment = cloud
    checkout = submitted(tmp_path / "checkout", 'echo "$@"; exit 143')
    status, output = run("slurm.sh", *SMOKE, "--out", "x", environment=environment, cwd=checkout)
    assert status == 143, output
    assert (folder / "calls").read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    said = (folder / "task0.log").read_text()
    assert said == "train tests/tiny_run.py --smoke --out x --processes auto\n"
    again = environment | {"SLURM_RESTART_COUNT": "1"}
    run("slurm.sh", *SMOKE, "--out", "x", environment=again, cwd=checkout)
    assert (folder / "task0.log").read_text().endswith("--out x --resume --processes auto\n")


def test_a_job_may_name_its_folder_by_a_variable(cloud, tmp_path):
    folder, environment = cloud
    checkout = submitted(tmp_path / "checkout", 'echo "$@"')
    environment["OUT"] = "gs://bucket/runs/mine"
    for more, out in (((), "gs://bucket/runs/mine"), (("--out", "x"), "x")):
        status, output = run("slurm.sh", *SMOKE, *more, environment=environment, cwd=checkout)
        assert status == 0, output
        said = (folder / "task0.log").read_text().splitlines()[-1]
        assert said == f"train tests/tiny_run.py --smoke --out {out} --processes auto"


@pytest.mark.parametrize("status", [0, 2])
def test_a_job_that_ends_by_itself_does_not(status, cloud, tmp_path):
    folder, environment = cloud
    checkout = submitted(tmp_path / "checkout", f"exit {status}")
    assert run("slurm.sh", *SMOKE, "--out", "x", environment=environment, cwd=checkout)[0] == status
    assert not (folder / "calls").exists()


@pytest.mark.slow
def test_tasks_train_together_save_and_go_on(cloud, tmp_path):
    folder, environment = cloud
    environment.pop("JAX_FORCE_TPU_INIT")
    checkout = submitted(tmp_path / "checkout", f'cd {TPU.parent}; exec {sys.executable} -m sdjax "$@"')
    arguments = ("tests/tiny_run.py", "--steps", "8", "--evaluate-every", "0", "--out", folder / "run")
    process = start("slurm.sh", *arguments, environment=environment | {"TINY_SLOW": "0.05"}, cwd=checkout)
    wait_for(lambda: len(lines(folder / "run")) >= 3, process)
    # `--signal=TERM@300` reaches the steps of the job, not its shell.
    step = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "srun"], capture_output=True, text=True, check=True)
    os.kill(int(step.stdout.split()[0]), signal.SIGTERM)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 143, output + logs(folder)
    assert "requeue" in (folder / "calls").read_text()
    again = environment | {"SLURM_RESTART_COUNT": "1"}
    status, output = run("slurm.sh", *arguments, environment=again, cwd=checkout)
    assert status == 0, output + logs(folder)
    assert [line["step"] for line in lines(folder / "run") if "evaluation" not in line] == list(range(1, 9))


# ---- Kubernetes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest():
    service, job = yaml.safe_load_all((TPU / "gke.yaml").read_text())
    return service, job, job["spec"]["template"]["spec"]


def test_pods_find_one_another(manifest):
    from jax._src.clusters.cloud_tpu_cluster import coordinator_port

    service, job, pod = manifest
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {
        "job-name": job["metadata"]["name"]
    }
    assert pod["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"
    ports = [port["containerPort"] for port in pod["containers"][0]["ports"]]
    assert int(coordinator_port) in ports


def test_pods_have_all_chips_of_a_slice(manifest):
    _, job, pod = manifest
    shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert shape in TOPOLOGIES["v5e"].split()
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert chips * job["spec"]["completions"] == math.prod(map(int, shape.split("x")))


def test_what_a_pod_runs(manifest):
    _, _, pod = manifest
    container = pod["containers"][0]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    own = {entry["name"]: entry["value"] for entry in container["env"]}
    assert own["OUT"].startswith("gs://")
    script = container["command"][2]
    subprocess.run(["bash", "-n", "-c", script], check=True)
    assert {*re.findall(r"\$\{?([A-Z]+)", script)} == {*own}
    assert (TPU.parent / own["EXPERIMENT"].split()[0]).exists()
    assert "exec .venv/bin/sdjax train" in script  # signals reach the run


@pytest.mark.parametrize("begun", [False, True])
def test_pods_go_on_with_a_run_that_has_begun(manifest, tmp_path, begun):
    """What a pod runs after its set-up, with this package; OUT may be on a disk or in a bucket."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    (tmp_path / ".venv/bin/sdjax").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / ".venv/bin/sdjax").chmod(0o755)
    out = tmp_path / "run"
    out.mkdir()
    if begun:
        (out / "arguments.json").write_text("{}")
    _, _, pod = manifest
    script = pod["containers"][0]["command"][2]
    lines = [line for line in script.splitlines() if "/shared" not in line and "setup.sh" not in line]
    environment = {**os.environ, "EXPERIMENT": "x.py --method sdpo", "OUT": str(out), "PYTHONPATH": str(TPU.parent)}
    command = ["bash", "-c", "\n".join(lines)]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    more = " --resume" if begun else ""
    assert ran.stdout == f"train x.py --method sdpo --out {out} --processes auto{more}\n"
