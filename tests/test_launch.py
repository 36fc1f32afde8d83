"""The scripts of launch/: what they would run, and shellcheck's opinion."""

import os
import shlex
import shutil
import subprocess

import pytest

from tests.support.paths import ROOT

LAUNCH = ROOT / "launch"
VARIABLES = {name: name.lower() for name in ("PROJECT", "ZONE", "CLUSTER", "NAME", "TYPE")}
VARIABLES |= {"RUNTIME": "runtime", "SOURCE": "https://example.org/repo", "IMAGE": "image:1"}
FLAGS = ["--config=configs/tiny_stage2.py", "--workdir=runs/a b"]
TRAIN = ["-m", "rtdmd_jax.main", *FLAGS]


def dry_run(script, **variables):
  """The commands that the script prints, as lists of words."""
  path = f"{LAUNCH}:{os.environ['PATH']}"
  done = subprocess.run(
    ["bash", LAUNCH / script, "--dry-run", *FLAGS],
    env={"PATH": path, **variables},
    capture_output=True,
    text=True,
  )
  return done.returncode, [shlex.split(line) for line in done.stdout.splitlines()], done.stderr


def test_shellcheck():
  checker = shutil.which("shellcheck")
  if checker is None:
    pytest.skip("shellcheck is not installed")
  done = subprocess.run(
    [checker, "-x", "--source-path=SCRIPTDIR/..", *sorted(LAUNCH.glob("*.sh"))],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_help_prints_the_usage_and_does_nothing_else(script, tmp_path):
  if script.name == "lib.sh":
    return
  shutil.copytree(LAUNCH, tmp_path / "launch")
  for flags in (["--help"], ["-h", *FLAGS], ["--dry-run", *FLAGS, "--help"]):
    done = subprocess.run(
      ["bash", "-x", tmp_path / "launch" / script.name, *flags],
      cwd=tmp_path / "launch",
      env={"PATH": os.environ["PATH"], "PS4": "ran: "},
      capture_output=True,
      text=True,
    )
    ran = {line.split()[1] for line in done.stderr.splitlines() if line.startswith("ran: ")}
    assert done.returncode == 0 and not ran & {"python3", "run", "environment", "exec", "mkdir"}
    assert f"launch/{script.name}" in done.stdout and "#" not in done.stdout.splitlines()[0]
    assert [path.name for path in tmp_path.iterdir()] == ["launch"]


def test_the_demo_takes_one_folder():
  for words, code in (([], 0), (["runs/a b"], 0), (["--workdir=x"], 2), (["a", "b"], 2)):
    done = subprocess.run(
      ["bash", LAUNCH / "demo.sh", "--dry-run", *words], capture_output=True, text=True
    )
    assert done.returncode == code
    if code:
      assert done.stdout == "" and done.stderr.count("\n") == 1 and words[0] in done.stderr
    else:
      last = shlex.split(done.stdout.splitlines()[-1])
      assert last[-1] == f"--workdir={words[0] if words else 'runs/tiny'}"


def test_too_old_a_python_is_a_sentence(tmp_path):
  shutil.copytree(LAUNCH, tmp_path / "launch")
  old = tmp_path / "bin/python3"
  old.parent.mkdir()
  old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
  old.chmod(0o755)
  done = subprocess.run(
    ["bash", tmp_path / "launch/demo.sh"],
    env={"PATH": f"{old.parent}:{os.environ['PATH']}"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2 and "this is Python 3.9.1" in done.stderr
  assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "launch"]


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gpus.sh"])
def test_one_machine(script):
  code, commands, _ = dry_run(script)
  assert code == 0
  assert commands[-1][1:] == TRAIN and commands[-2][1:] == [*TRAIN[:2], "--check", *FLAGS]
  assert f".[{'tpu' if script == 'tpu_vm.sh' else 'gpu'}]" in commands[-3]


@pytest.mark.parametrize(
  "memory, visible, setup",
  [
    ([81559], "", ":1x80"),
    ([143771], "", ":1x141"),
    ([81559] * 8, "", ":8x80"),
    ([143771] * 8, "3", ":1x141"),
    ([81559] * 4, "", ""),
    ([24564], "", ""),
    (["No devices were found"], "", ""),
    ([], "", ""),
  ],
)
@pytest.mark.parametrize("script", ["gpus.sh", "slurm.sh"])
def test_gpus_choose_the_settings(script, memory, visible, setup, tmp_path):
  """Of a published configuration without an argument, by what nvidia-smi says."""
  tool = tmp_path / "nvidia-smi"
  lines = "\n".join(map(str, memory))
  tool.write_text(f'#!/bin/sh\necho "{lines}"\n' if memory else "#!/bin/sh\nexit 9\n")
  tool.chmod(0o755)
  for config, expected in (
    ("configs/sd35_stage2.py", f"configs/sd35_stage2.py{setup}"),
    ("configs/sd35_stage1.py:scored", "configs/sd35_stage1.py:scored"),
    ("configs/tiny_stage2.py", "configs/tiny_stage2.py"),
  ):
    done = subprocess.run(
      ["bash", LAUNCH / script, "--dry-run", f"--config={config}", "--workdir=w"],
      env={
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": visible,
        "SLURM_SUBMIT_DIR": str(ROOT),
      },
      capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout.splitlines()[-1])[-2:] == [f"--config={expected}", "--workdir=w"]


@pytest.mark.parametrize("slices, nodes", [("1", ["--node-id=name"]), ("3", ["--node-count=3"])])
def test_tpu_slices(slices, nodes):
  code, commands, _ = dry_run("tpu_pod.sh", SLICES=slices, **VARIABLES)
  assert code == 0 and len(commands) == 4
  assert commands[0][:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
  assert set(nodes) < set(commands[0])
  assert all("--worker=all" in command and "--node=all" in command for command in commands[1:])
  remote = shlex.split(commands[-1][-1].removeprefix("--command="))
  assert remote[3] == "RTDMD_COORDINATOR=auto" and remote[5:] == TRAIN


def test_gke():
  code, (command,), _ = dry_run("gke_xpk.sh", **VARIABLES)
  assert code == 0 and command[:3] == ["xpk", "workload", "create"]
  remote = shlex.split(command[-1].removeprefix("--command="))
  assert remote[0] == "RTDMD_COORDINATOR=auto" and remote[2:] == TRAIN


def test_slurm(tmp_path):
  code, (command,), _ = dry_run("slurm.sh", SLURM_SUBMIT_DIR=str(LAUNCH.parent))
  assert code == 0 and command[0] == "srun" and command[-4:] == TRAIN


@pytest.mark.parametrize("script", ["tpu_pod.sh", "gke_xpk.sh"])
def test_a_missing_variable_is_named(script):
  code, commands, error = dry_run(script, PROJECT="p")
  assert code != 0 and commands == [] and "ZONE" in error
