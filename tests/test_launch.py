"""The files of launch/ are what a cluster would read: their shell and YAML parse, their command is one that the command line takes."""

import importlib
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
from absl import flags
from jaxalign.cli import launch
from jaxalign.cli import main as cli

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "launch").iterdir())


def jobset():
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / "launch/jobset.yaml").read_text())


def command(path: Path) -> list[str]:
    """The words after `jaxalign` that the file runs."""
    if path.suffix == ".yaml":
        program, *words = jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
        assert program == "jaxalign"
        return words
    text = re.sub(r"^\s*#.*$", "", path.read_text(), flags=re.M).replace("\\\n", " ")
    (line,) = re.findall(r"jaxalign (train .*?)(?: > |\s+\"\$@\"|$)", text, re.M)
    return shlex.split(re.sub(r"\"?\$\{?(\w+)\}?\"?", r"\1", line))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_the_command_is_one_that_the_command_line_takes(path, monkeypatch):
    verb, *argv = command(path)
    argv = ["--config=configs/sft.py" if a == "--config=CONFIG" else a for a in argv]
    monkeypatch.chdir(ROOT)
    fv = flags.FlagValues()
    importlib.import_module(f"jaxalign.cli.{verb}").define(fv)
    assert cli.parse(fv, [f"jaxalign {verb}", *argv]) == []
    assert fv.distributed and fv.workdir and fv.config.stage.data.path and fv.config.model.dtype == "bfloat16"


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".sh"], ids=lambda p: p.name)
def test_shell_parses(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_slurm_gives_each_process_all_gpus_of_its_node(tmp_path):
    """With a stand-in for srun that runs one task: eight GPUs by number, and the arguments as they were given."""
    (tmp_path / "srun").write_text('#!/bin/bash\nshift\nSLURM_GPUS_ON_NODE=8 exec "$@"\n')
    (tmp_path / "jaxalign").write_text('#!/bin/bash\necho "$JAX_LOCAL_DEVICE_IDS"; printf "%s\\n" "$@"\n')
    for f in tmp_path.iterdir():
        f.chmod(0o755)
    done = subprocess.run([ROOT / "launch/slurm.sh", "--config.seed=7"], env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": "/h o"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids, *argv = done.stdout.splitlines()
    assert ids == "0,1,2,3,4,5,6,7" and argv[:2] == ["train", "--config=configs/sft.py"] and argv[2] == "--workdir=/h o/jaxalign/runs/sft" and argv[-1] == "--config.seed=7"


def test_jobset_tells_each_pod_who_it_is(monkeypatch):
    spec = jobset()
    (job,) = spec["spec"]["replicatedJobs"]
    nodes, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    (box,) = pod["containers"]
    env = {e["name"]: e for e in box["env"]}
    assert list(env).index("INDEX") < list(env).index(launch.ENV)  # $(INDEX) is only put in where it was said before
    assert nodes["completionMode"] == "Indexed" and nodes["parallelism"] == nodes["completions"]
    index, count, address = env[launch.ENV]["value"].split("/")
    host, port = address.split(":")
    assert index == "$(INDEX)" and int(count) == nodes["completions"] and int(port) == box["ports"][0]["containerPort"]
    assert host == f"{spec['metadata']['name']}-{job['name']}-0-0.{spec['metadata']['name']}"
    assert {v["name"] for v in pod["volumes"]} == {m["name"] for m in box["volumeMounts"]}
    # And that is what the program reads.
    seen = {}
    monkeypatch.setenv(launch.ENV, env[launch.ENV]["value"].replace("$(INDEX)", "1"))
    import jax

    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: seen.update(args=a))
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError))
    with launch.joined(True):
        assert seen["args"] == (address, 2, 1)


def test_stopping_a_pod_stops_the_run_itself(tmp_path):
    """With stand-ins for gcloud, which runs its command here, and for jaxalign, which says what signal it got."""
    home, shared = tmp_path / "home", tmp_path / "shared"
    (home / "jaxalign-env/bin").mkdir(parents=True), (shared / "jaxalign").mkdir(parents=True)
    stand_ins = {home / "jaxalign-env/bin/jaxalign": f"#!/bin/bash\ntrap 'echo stopped > {tmp_path}/saved; exit 143' TERM\ntouch {tmp_path}/on\nfor i in $(seq 100); do sleep 0.1; done\n"}
    stand_ins[tmp_path / "gcloud"] = '#!/bin/bash\nfor a in "$@"; do case "$a" in --command=*) bash -c "${a#--command=}";; esac; done\n'
    for path, text in stand_ins.items():
        path.write_text(text)
        path.chmod(0o755)
    script = (ROOT / "launch/tpu_pod.sh").read_text().replace("SHARED=/mnt/shared", f"SHARED={shared}").replace("/tmp/jaxalign", f"{tmp_path}/jaxalign")
    (tmp_path / "pod.sh").write_text(script)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(home)}
    wait = lambda path: next((True for _ in range(100) if path.exists() or time.sleep(0.1)), False)
    subprocess.run(["bash", tmp_path / "pod.sh", "train"], env=env, check=True, timeout=20, stdout=subprocess.DEVNULL)
    assert wait(tmp_path / "on")
    subprocess.run(["bash", tmp_path / "pod.sh", "stop"], env=env, check=True, timeout=20)
    assert wait(tmp_path / "saved") and (tmp_path / "saved").read_text() == "stopped\n"
