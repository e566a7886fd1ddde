"""Sums of what a run's sessions cost: what was kept once, what was done as often as it was."""

import json
import pathlib

import pytest

from glmjax import errors
from glmjax.cards import compute
from glmjax.train import energy

GPU, UNKNOWN = "NVIDIA H200", "TPU v9"


def part(name: str = GPU, meter: str | None = "NVML energy counter", measured: float = 0.0, **given: object) -> dict:
  ranged = {"low_kwh": measured, "high_kwh": measured, "unmeasured_seconds": 0.0, "watts": None, "problem": None}
  return {"part": name, "count": 1, "meter": meter, "measured_kwh": measured} | ranged | given


def ranged(name: str, low: float, high: float | None, meter: str | None = None, measured: float = 0.0) -> dict:
  return part(name, meter, measured, low_kwh=low, high_kwh=high, unmeasured_seconds=60.0)


def line(session: str, first: int, step: int, done: int, *parts: dict, process: int = 0, **given: object) -> dict:
  """A line of a session of two GPUs, whose steps take a minute, have four samples of eight tokens, 100 FLOPs each."""
  work = {"steps": done, "samples": 4 * done, "tokens": 32 * done, "model_flops": 3200.0 * done}
  return {
    "session": session,
    "started": "2026-11-30T00:00:00Z",
    "process": process,
    "processes": 1,
    "devices": [{"count": 2, "platform": "gpu", "kind": GPU}],
    "host": {"id": "h", "processor": "a processor", "cpus": 4, "cpus_of_host": 8},
    "versions": {"python": "3.11", "jax": "0.10.2", "commit": None},
    "seconds": 60.0 * done,
    "first_step": first,
    "step": step,
    "done": work | {"step_seconds": 54.0 * done},
    "mfu": 0.25,
    "peak_bytes": {"host": 100, "device": None},
    "energy": {"low_kwh": 0, "high_kwh": 0, "parts": [*parts], "not_counted": ["cooling"]},
    "ended": True,
  } | given


def write(workdir: pathlib.Path, lines: list[dict], steps: int, process: int = 0) -> None:
  """Writes these lines, and metrics.jsonl with those of so many steps."""
  name = f"compute-{process}.jsonl" if process else "compute.jsonl"
  (workdir / name).write_text("".join(json.dumps(each) + "\n" for each in lines))
  of_steps = ({"step": i, "tokens": 32, "samples_seen": 4 * i, "tokens_seen": 32 * i} for i in range(1, steps + 1))
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in of_steps))


def test_what_is_not_recorded_is_none(tmp_path):
  assert compute.total(tmp_path) is None and compute.total(tmp_path / "none") is None
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 32, "samples_seen": 4, "tokens_seen": 32}\n')
  assert compute.total(tmp_path) is None
  (tmp_path / "compute.jsonl").write_text("")
  assert compute.total(str(tmp_path)) is None


def test_steps_done_again_count_for_hours_and_energy_and_not_for_tokens(tmp_path):
  """Ten steps to step 10, of which the last four came again behind a kill; then to 12 and an idle start."""
  sessions = [
    line("a", 0, 0, 0, part(), ended=False),
    line("a", 0, 10, 10, part(measured=1.0), ended=False),
    line("b", 6, 12, 6, part(measured=0.5)),
    line("c", 12, 12, 0, part(measured=0.01)),
  ]
  write(tmp_path, sessions, steps=12)
  found = compute.total(tmp_path)
  assert (found.sessions, found.restarts, found.killed) == (2, 1, 1)
  assert (found.kept.steps, found.kept.samples, found.kept.tokens, found.kept.model_flops) == (12, 48, 384, 38_400)
  assert (found.done.steps, found.done.samples, found.done.tokens, found.done.model_flops) == (16, 64, 512, 51_200)
  assert found.wall_hours == pytest.approx(16 / 60) and found.device_hours == {GPU: pytest.approx(32 / 60)}
  assert found.step_hours == pytest.approx(0.9 * 16 / 60)
  assert found.energy.low_kwh == found.energy.high_kwh == found.energy.measured_kwh == pytest.approx(1.51)
  assert found.energy.meters == {"NVML energy counter": pytest.approx(1.51)} and not found.energy.ranges
  assert (found.step, found.first_step, found.unrecorded_steps) == (12, 0, 0)
  assert json.loads(json.dumps(found.to_dict())) == found.to_dict() and found.to_dict()["restarts"] == 1


def test_what_no_line_tells_is_told_so(tmp_path):
  """A record that begins at step 100; a kill ten steps behind the last line; metrics.jsonl that is gone."""
  write(tmp_path, [line("a", 100, 110, 10, ended=False), line("b", 120, 130, 10)], steps=130)
  found = compute.total(tmp_path)
  assert (found.first_step, found.unrecorded_steps, found.kept.steps) == (100, 10, 130)
  (tmp_path / "metrics.jsonl").unlink()
  assert compute.total(tmp_path).kept is None


def test_steps_up_to_the_checkpoint_behind_the_last_line_are_unrecorded(tmp_path, monkeypatch):
  write(tmp_path, [line("a", 0, 10, 10, ended=False), line("b", 12, 20, 8, ended=False)], steps=25)
  for saved, unrecorded in (([15, 20], 2), ([20, 25], 7), ([15], 2), ([], 2)):
    monkeypatch.setattr(compute.manager_lib, "steps", lambda folder, saved=saved: saved)
    assert compute.total(tmp_path).unrecorded_steps == unrecorded


def test_versions_and_where_they_changed(tmp_path):
  newer = {"python": "3.11", "jax": "0.11.0", "commit": "c0ffee"}
  sessions = [line("a", 0, 5, 5), line("b", 5, 9, 4), line("c", 9, 12, 3, versions=newer, mfu=0.5)]
  write(tmp_path, sessions, steps=12)
  found = compute.total(tmp_path)
  assert found.versions == newer and found.mfu == (0.25, 0.5)
  assert found.changes == [
    compute.Change(3, 9, "jax", "0.10.2", "0.11.0"),
    compute.Change(3, 9, "commit", None, "c0ffee"),
  ]


def test_ranges_are_apart_from_what_is_measured(tmp_path):
  lost = ranged(GPU, 2.0, 9.0, meter="NVML energy counter", measured=1.5)  # its counter vanished
  write(tmp_path, [line("a", 0, 5, 5, part(measured=1.0), lost, ranged(energy.PROCESSORS, 0.1, 3.0))], steps=5)
  found = compute.total(tmp_path).energy
  assert found.measured_kwh == 2.5 and found.ranges == {GPU: (0.5, 7.5), energy.PROCESSORS: (0.1, 3.0)}
  assert (found.low_kwh, found.high_kwh) == (pytest.approx(3.1), pytest.approx(13.0))
  write(tmp_path, [line("a", 0, 5, 5, part(measured=1.0), ranged(UNKNOWN, 0.0, None))], steps=5)
  found = compute.total(tmp_path).energy
  assert (found.low_kwh, found.high_kwh, found.ranges) == (1.0, None, {UNKNOWN: (0.0, None)})


def test_each_process_has_devices_and_each_host_its_processors_once(tmp_path):
  """Two processes on one host, which measures its packages twice, and one on another."""
  rapl = "RAPL, packages"
  hosts = [{"id": host, "processor": "a processor", "cpus": 8, "cpus_of_host": 8} for host in ("h", "h", "i")]
  for process, (host, packages) in enumerate(zip(hosts, (2.0, 2.1, 4.0))):
    parts = part(measured=1.0), part(energy.PROCESSORS, rapl, packages)
    write(tmp_path, [line("a", 0, 5, 5, *parts, process=process, host=host)], 5, process)
  found = compute.total(tmp_path)
  assert found.energy.meters == {"NVML energy counter": 3.0, rapl: pytest.approx(6.1)}
  assert found.done.steps == 5 and found.device_hours == {GPU: pytest.approx(10 / 60)}


@pytest.mark.parametrize("cpus, times", [(2, 2), (4, 2), (8, 1)])
def test_cpus_that_processes_share_count_once(tmp_path, cpus, times):
  """Two of a host of eight: with two or four of their own each, or with all."""
  host = {"id": "h", "processor": "a processor", "cpus": cpus, "cpus_of_host": 8}
  for process in range(2):
    shown = ranged(energy.PROCESSORS, 1.0, 10.0)
    write(tmp_path, [line("a", 0, 5, 5, shown, process=process, host=host)], 5, process)
  assert compute.total(tmp_path).energy.ranges == {energy.PROCESSORS: (times * 1.0, times * 10.0)}


def test_damaged_lines_are_told_of_and_left_out(tmp_path, caplog):
  whole = [line("a", 0, 5, 5, part(measured=1.0)), line("b", 5, 9, 4)]
  write(tmp_path, whole, steps=9)
  wrong: list[object] = ["x", [], {}, {"session": "a"}, whole[0] | {"seconds": "5"}, whole[0] | {"step": -1}]
  wrong += [whole[0] | {"energy": {"parts": 3}}, whole[0] | {"done": None}, whole[0] | {"versions": [1]}]
  wrong += [whole[0] | {"step": 10**400}, whole[0] | {"seconds": 10**400}, whole[0] | {"process": 1.5}]
  wrong += [whole[0] | {"host": whole[0]["host"] | {name: 0}} for name in ("cpus", "cpus_of_host")]
  wrong += [line("a", 0, 5, 5, part(measured=1e308)), whole[0] | {"done": whole[0]["done"] | {"tokens": 0.5}}]
  texts = [json.dumps(each) for each in wrong] + ["[" * 100_000, "\0\xff", '{"seconds": 1e999}', "9" * (3 << 20)]
  text = "".join(f"{each}\n" for each in [*texts, *map(json.dumps, whole), '{"session": "half'])
  (tmp_path / "compute.jsonl").write_text(text.rstrip("\n"))
  found = compute.total(tmp_path)
  assert (found.sessions, found.done.steps, found.energy.measured_kwh) == (2, 9, 1.0)
  [said] = caplog.messages
  assert "damaged lines are left out" in said


def test_a_file_that_is_none(tmp_path):
  (tmp_path / "compute.jsonl").mkdir()
  with pytest.raises(errors.InputError, match="compute.jsonl"):
    compute.total(tmp_path)
