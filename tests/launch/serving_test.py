"""What serves a model elsewhere: its flags are the command's; ports, paths and times agree."""

import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from glmjax.cli import run as run_lib

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install pyyaml")


def flags(words: list[str]) -> dict[str, str]:
  """Of `glmjax serve`, by its own parser."""
  assert words[:2] == ["glmjax", "serve"], words
  run_lib._parse_flags(words[1:])
  return dict(word.removeprefix("--").split("=", 1) for word in words[2:])


def dockerfile() -> dict[str, list[str]]:
  """The lines of each stage."""
  text = re.sub(r"^#.*\n", "", (LAUNCH / "Dockerfile").read_text(encoding="utf-8"), flags=re.M)
  stages = re.split(r"^FROM ", text, flags=re.M)[1:]
  return {stage.splitlines()[0].rpartition(" AS ")[2]: stage.splitlines() for stage in stages}


def entrypoint() -> list[str]:
  [line] = [line for line in dockerfile()["serve"] if line.startswith("ENTRYPOINT ")]
  return yaml.safe_load(line.removeprefix("ENTRYPOINT "))


def unit() -> dict[str, str]:
  """Settings of the systemd unit's [Service]."""
  section = (LAUNCH / "glmjax.service").read_text(encoding="utf-8").partition("[Service]\n")[2].partition("\n[")[0]
  return dict(line.split("=", 1) for line in section.splitlines() if "=" in line and not line.startswith("#"))


def kubernetes() -> tuple[dict, dict]:
  deployment, service = yaml.safe_load_all((LAUNCH / "serve_kubernetes.yaml").read_text(encoding="utf-8"))
  assert (deployment["kind"], service["kind"]) == ("Deployment", "Service")
  return deployment, service


def skypilot() -> dict:
  return yaml.safe_load((LAUNCH / "serve_skypilot.yaml").read_text(encoding="utf-8"))


def test_the_image():
  given = flags(entrypoint())
  lines = dockerfile()["serve"]
  assert given["host"] == "0.0.0.0" and f"EXPOSE {given['port']}" in lines
  [health] = [line for line in lines if line.startswith("HEALTHCHECK")]
  assert f"http://127.0.0.1:{given['port']}/health" in health
  assert lines.index("USER 1000") < lines.index(health), "it serves as a user without rights"
  assert list(dockerfile())[-1] == "train", "what is built without --target is the one that trains"
  assert "serve]" in "".join(dockerfile()["glmjax"])


def test_the_unit():
  given, settings = flags(["glmjax", *shlex.split(unit()["ExecStart"])[1:]]), unit()
  assert given["host"] == "127.0.0.1"
  assert given["api_keys"].removeprefix("%d/") == settings["LoadCredential"].split(":")[0]
  assert int(settings["TimeoutStopSec"]) > float(given["drain_seconds"]) + 10
  assert settings["RestartPreventExitStatus"] == "2"
  assert "MemoryDenyWriteExecute" not in settings, "XLA runs what it compiles"


def test_systemd_knows_every_setting(tmp_path):
  """systemd-analyze, with a program that is there."""
  if shutil.which("systemd-analyze") is None:
    pytest.skip("no systemd-analyze here")
  copy = tmp_path / "glmjax.service"
  text = (LAUNCH / "glmjax.service").read_text(encoding="utf-8")
  copy.write_text(text.replace("/opt/glmjax/bin/glmjax", "/bin/true"), encoding="utf-8")
  done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
  assert done.returncode == 0 and copy.name not in done.stderr, done.stderr


def test_kubernetes_asks_where_the_server_answers():
  deployment, service = kubernetes()
  pod = deployment["spec"]["template"]["spec"]
  [container] = pod["containers"]
  given = flags([*entrypoint(), *container["args"]])
  [port] = container["ports"]
  assert port["containerPort"] == int(given["port"])
  assert service["spec"]["ports"][0]["targetPort"] == port["name"]
  probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
  assert all(probe["port"] == port["name"] for probe in probes.values())
  assert [probe["path"] for probe in probes.values()] == ["/ready", "/ready", "/health"]
  mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
  assert mounts[given["checkpoint"]]["readOnly"] and str(pathlib.Path(given["api_keys"]).parent) in mounts
  assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}
  before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
  assert pod["terminationGracePeriodSeconds"] > before + float(given["drain_seconds"]) + 10


def test_kubernetes_finds_its_pods_and_gives_them_no_rights():
  deployment, service = kubernetes()
  labels = deployment["spec"]["template"]["metadata"]["labels"]
  assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
  pod = deployment["spec"]["template"]["spec"]
  assert pod["securityContext"]["runAsUser"] == 1000 and pod["securityContext"]["runAsNonRoot"]
  rights = pod["containers"][0]["securityContext"]
  assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
  assert rights["capabilities"] == {"drop": ["ALL"]}


def test_skypilot_serves_what_it_was_told(tmp_path):
  """The run section, with a glmjax that says how it was called; nothing is served without keys."""
  task = skypilot()
  ran = task["run"].replace("exec glmjax", "printf '%s\\n' glmjax")
  environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "CHECKPOINT": "s3://mine/a model", "API_KEYS": "a\nb"}
  done = subprocess.run(["bash", "-c", ran], env=environment, capture_output=True, text=True, check=True)
  given = flags(done.stdout.splitlines())
  assert given["checkpoint"] == "s3://mine/a model" and int(given["port"]) == task["resources"]["ports"]
  keys = pathlib.Path(given["api_keys"])
  assert keys.read_text() == "a\nb\n" and keys.stat().st_mode & 0o077 == 0
  for missing in ("CHECKPOINT", "API_KEYS"):
    done = subprocess.run(
      ["bash", "-c", ran], env=environment | {missing: ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "is empty" in done.stderr and not done.stdout
  assert task["service"]["readiness_probe"]["path"] == "/ready" and task["service"]["replicas"] > 1
  assert set(task["envs"].values()) | set(task["secrets"].values()) == {""}, "what is not given stops it"
