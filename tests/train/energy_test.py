"""Energy: counters that count, come round, vanish or are not to be read; ranges where there is none."""

import ctypes
import pathlib
import shutil
import subprocess
import types

import pytest

from glmjax.plan import targets
from glmjax.train import energy

H200 = "NVIDIA H200"
KWH = energy.JOULES_OF_KWH

# NVML and CUDA's driver, as their headers have what is called of them. GPU 1 is what CUDA has as its first.
LIBRARIES = """
#include <stdio.h>
#include <string.h>
unsigned long long millijoules = 4000000000000ULL;
unsigned int milliwatts = 250000, mig = 0; int energy_code = 0, initialised = 0; char asked[32];
int cuInit(unsigned int flags) { initialised |= 1; return flags ? 1 : 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 7; return ordinal > 1; }
int cuDeviceGetPCIBusId(char *bus, int size, int device) { snprintf(bus, size, "0000:%02X:00.0", device); return 0; }
int nvmlInit_v2(void) { initialised |= 2; return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **handle) {
  strcpy(asked, bus); *handle = (void *)0x7f0123456789; return initialised == 3 ? 0 : 1; }
static int wrong(void *handle) { return handle != (void *)0x7f0123456789; }
int nvmlDeviceGetMigMode(void *handle, unsigned int *current, unsigned int *pending) {
  *current = mig; *pending = 0; return wrong(handle); }
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *found) {
  *found = millijoules; return wrong(handle) ? 2 : energy_code; }
int nvmlDeviceGetPowerUsage(void *handle, unsigned int *found) { *found = milliwatts; return wrong(handle); }
"""


class Clock:
  """Seconds, as the test has them."""

  def __init__(self):
    self.now = 0.0

  def __call__(self) -> float:
    return self.now


class Told:
  """A counter that gives what the test says; an error is raised."""

  def __init__(self, *joules: float | Exception, meter: str = "told"):
    self.meter, self.samples, self._joules = meter, False, list(joules)

  def joules(self) -> float:
    found = self._joules.pop(0)
    if isinstance(found, Exception):
      raise found
    return found


@pytest.fixture(name="clock")
def _clock():
  return Clock()


@pytest.fixture(name="meter")
def _meter(clock):
  """Makes meters that end with the test."""
  made = []

  def make(*parts: energy.Part) -> energy.Meter:
    made.append(energy.Meter(parts, clock))
    return made[-1]

  yield make
  for each in made:
    each.close()


def zone(root: pathlib.Path, name: str, called: str, energy_uj: int, most: int = 262_143_328_850) -> pathlib.Path:
  """A zone of a powercap tree."""
  (root / name).mkdir(parents=True)
  for file, content in (("name", called), ("energy_uj", energy_uj), ("max_energy_range_uj", most)):
    (root / name / file).write_text(f"{content}\n")
  return root / name


def device(kind: str, platform: str = "gpu", number: int = 0):
  return types.SimpleNamespace(device_kind=kind, platform=platform, local_hardware_id=number)


@pytest.fixture(name="powercap")
def _powercap(tmp_path, monkeypatch):
  """Where this host's zones are looked for; none yet."""
  monkeypatch.setattr(energy, "_POWERCAP", tmp_path / "powercap")
  return tmp_path / "powercap"


def test_packages_are_counted_once_and_what_is_within_them_not(powercap, meter):
  packages = [zone(powercap, f"intel-rapl:{i}", f"package-{i}", 5_000_000) for i in range(2)]
  zone(powercap, "intel-rapl:0:0", "core", 10)
  zone(powercap, "intel-rapl:2", "psys", 10)
  zone(powercap, "intel-rapl-mmio:0", "package-0", 10)
  (powercap / "intel-rapl").mkdir()
  [part] = energy.of_here([device("cpu", "cpu")])
  counted = meter(part)
  (packages[0] / "energy_uj").write_text("8000000\n")
  (packages[1] / "energy_uj").write_text("9000000\n")
  (powercap / "intel-rapl:0:0" / "energy_uj").write_text("99999999\n")
  found = counted.read()
  assert found["low_kwh"] == found["high_kwh"] == pytest.approx(7 / KWH)
  assert (found["parts"][0]["meter"], found["parts"][0]["problem"]) == ("RAPL, packages", None)
  assert "memory" in found["not_counted"] and "processors" not in found["not_counted"]


def test_memory_is_counted_where_it_is_told(powercap, meter):
  zone(powercap, "intel-rapl:0", "package-0", 0)
  memory = zone(powercap, "intel-rapl:0:1", "dram", 0)
  counted = meter(*energy.of_here([]))
  (memory / "energy_uj").write_text("3600000000")
  found = counted.read()
  assert found["parts"][0]["measured_kwh"] == pytest.approx(0.001) and "memory" not in found["not_counted"]


def test_a_counter_comes_round(powercap, meter):
  path = zone(powercap, "intel-rapl:0", "package-0", 999_000_000, most=1_000_000_000) / "energy_uj"
  counted = meter(*energy.of_here([]))
  for value in (999_500_000, 300_000_000, 900_000_000, 100_000_000):  # 0.5, 300.5, 600, 200 J
    path.write_text(str(value))
    found = counted.read()
  assert found["low_kwh"] == pytest.approx(1101 / KWH)


def test_a_counter_that_vanishes_is_named_once_and_the_range_stands_for_it(powercap, meter, clock, caplog):
  path = zone(powercap, "intel-rapl:0", "package-0", 0) / "energy_uj"
  [part] = energy.of_here([device("cpu", "cpu")])
  counted = meter(part)
  path.write_text("36000000")
  clock.now = 10
  assert counted.read()["high_kwh"] == pytest.approx(36 / KWH)
  path.unlink()
  for clock.now in (20, 3610):
    found = counted.read()
  low, high = (watts * energy.cpus() for watts in energy.CPU_WATTS)
  assert found["low_kwh"] == pytest.approx((36 + 3600 * low) / KWH)
  assert found["high_kwh"] == pytest.approx((36 + 3600 * high) / KWH)
  [said] = caplog.messages
  assert "processors: RAPL, packages cannot be read any more" in said and "a range stands for it" in said
  assert found["parts"][0]["meter"] == "RAPL, packages" and found["parts"][0]["problem"]
  path.write_text("nonsense")  # comes back too late
  assert counted.read()["parts"][0]["measured_kwh"] == pytest.approx(36 / KWH)


@pytest.mark.parametrize("wrong", ["no permission", "no number", "no range", "another architecture", "no tree"])
def test_processors_without_a_counter_have_a_range(powercap, meter, clock, monkeypatch, caplog, wrong):
  if wrong != "no tree":
    path = zone(powercap, "intel-rapl:0", "package-0" if wrong != "another architecture" else "x", 0)
    zone(powercap, "intel-rapl:1", "package-1" if wrong != "another architecture" else "x", 0)
  if wrong == "no number":
    (path / "energy_uj").write_text("")
  elif wrong == "no range":
    (path / "max_energy_range_uj").unlink()
  elif wrong == "no permission":
    read = pathlib.Path.read_text

    def refuse(self, *arguments, **named):
      if self.name == "energy_uj":
        raise PermissionError(13, "Permission denied")
      return read(self, *arguments, **named)

    monkeypatch.setattr(pathlib.Path, "read_text", refuse)
  [part] = energy.of_here([device("cpu", "cpu")])
  counted = meter(part)
  clock.now = 3600
  found = counted.read()
  assert found["low_kwh"] == pytest.approx(energy.cpus() * 0.0007) and found["high_kwh"] == energy.cpus() * 0.02
  [described] = found["parts"]
  assert described["meter"] is None and described["measured_kwh"] == 0 and described["problem"].startswith("RAPL: ")
  assert not caplog.messages  # most hosts are so


def test_devices_without_a_counter_have_their_makers_range(powercap, meter, clock):
  """Beside a device the host's processors, which no counter tells, are not counted, and that is said."""
  parts = energy.of_here([device("TPU v4", "tpu"), device("TPU v4", "tpu")])
  counted = meter(*parts)
  clock.now = 1800
  found = counted.read()
  assert (found["low_kwh"], found["high_kwh"]) == (pytest.approx(0.090), pytest.approx(0.192))
  assert [(part["part"], part["count"], part["watts"]) for part in found["parts"]] == [("TPU v4", 2, [180, 384])]
  assert found["not_counted"][:2] == ["processors", "memory"]


def test_of_what_is_not_known_nothing_is_guessed(powercap, meter, clock):
  zone(powercap, "intel-rapl:0", "package-0", 0)
  counted = meter(*energy.of_here([device("TPU v9", "tpu"), device("TPU v6 lite", "tpu")]))
  clock.now = 60
  found = counted.read()
  assert found["low_kwh"] == 0 and found["high_kwh"] is None
  assert [part["high_kwh"] for part in found["parts"]] == [None, None, 0]


def test_devices_that_a_counter_tells_are_apart_from_those_that_none_does(meter, clock):
  range_ = (70.0, 700.0)
  parts = [
    energy.Part(H200, 1, range_, Told(KWH, KWH)),
    energy.Part(H200, 1, range_, Told(KWH, OSError("fallen off the bus"))),
    energy.Part(H200, 1, range_, Told(KWH, KWH)),
  ]
  counted = meter(*parts)
  counted.read()
  clock.now = 3600
  found = counted.read()
  assert [(part["count"], part["measured_kwh"]) for part in found["parts"]] == [(2, 4), (1, 1)]
  assert (found["low_kwh"], found["high_kwh"]) == (pytest.approx(5.07), pytest.approx(5.7))


def test_a_device_of_no_known_range_is_known_as_long_as_it_is_measured(meter, clock):
  counted = meter(energy.Part("TPU v9", 1, None, Told(KWH, ZeroDivisionError())))
  clock.now = 1
  assert counted.read()["high_kwh"] == 1
  found = counted.read()
  assert (found["low_kwh"], found["high_kwh"]) == (1, 1)  # for no time at all
  clock.now = 2
  assert counted.read()["high_kwh"] is None


def test_the_thread_looks_by_itself(monkeypatch):
  """So that no counter comes round twice between two saves."""
  monkeypatch.setattr(energy, "_EVERY", 0.01)

  class Rising:
    meter, samples, calls = "rising", False, 0

    def joules(self) -> float:
      self.calls += 1
      return 1.0

  rising = Rising()
  counted = energy.Meter([energy.Part("x", 1, None, rising)])
  for _ in range(1000):
    if rising.calls > 2:
      break
    counted._end.wait(0.01)
  counted.close()
  assert rising.calls > 2 and not counted._thread.is_alive()


@pytest.fixture(name="nvml", scope="module")
def _nvml(tmp_path_factory):
  """A library with the functions of NVML and CUDA's driver, compiled: what is called with wrong types would crash."""
  if shutil.which("cc") is None:
    pytest.skip("there is no C compiler")
  folder = tmp_path_factory.mktemp("nvml")
  (folder / "fake.c").write_text(LIBRARIES)
  subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "fake.so", folder / "fake.c"], check=True)
  return ctypes.CDLL(str(folder / "fake.so"))


@pytest.fixture(name="set_gpu")
def _set_gpu(nvml):
  """Sets the variables of the library, and takes that back."""
  types_ = {"millijoules": ctypes.c_ulonglong, "milliwatts": ctypes.c_uint, "mig": ctypes.c_uint}
  variables = {name: type_.in_dll(nvml, name) for name, type_ in types_.items()}
  variables["energy_code"] = ctypes.c_int.in_dll(nvml, "energy_code")
  before = {name: variable.value for name, variable in variables.items()}

  def set_(**values: int) -> None:
    for name, value in values.items():
      variables[name].value = value

  yield set_
  set_(**before)


def test_a_gpu_tells_its_energy(nvml, set_gpu):
  """The one that CUDA means: NVML finds it by its place on the bus. The counter has 64 bits."""
  counter = energy.gpu_counter(nvml, nvml, 1)
  assert counter.meter == "NVML energy counter" and not counter.samples
  assert (ctypes.c_char * 32).in_dll(nvml, "asked").value == b"0000:08:00.0"
  set_gpu(millijoules=4_000_000_007_500)
  assert counter.joules() == 7.5 and counter.joules() == 0
  set_gpu(millijoules=1_000)
  with pytest.raises(OSError, match="backwards"):
    counter.joules()


def test_an_older_gpu_tells_its_power(nvml, set_gpu, clock):
  set_gpu(energy_code=3)
  counter = energy.gpu_counter(nvml, nvml, 0)
  assert counter.meter == "NVML power samples" and counter.samples
  counter._clock, counter._at = clock, 0.0
  clock.now = 2
  set_gpu(milliwatts=350_000)
  assert counter.joules() == pytest.approx(600)  # 250 to 350 W
  clock.now = 3
  assert counter.joules() == pytest.approx(350)


def test_a_gpu_that_cannot_be_counted(nvml, set_gpu):
  with pytest.raises(OSError, match="cuDeviceGet returns 1"):
    energy.gpu_counter(nvml, nvml, 2)
  with pytest.raises(OSError, match="the driver has no cuInit"):
    energy.gpu_counter(nvml, types.SimpleNamespace(), 0)
  set_gpu(mig=1)
  with pytest.raises(OSError, match="a part of the GPU"):
    energy.gpu_counter(nvml, nvml, 0)


def test_a_host_without_the_driver(powercap, meter, clock, monkeypatch):
  monkeypatch.setattr(energy, "_NVML", "libno-such-thing.so.1")
  counted = meter(*energy.of_here([device(H200)]))
  clock.now = 3600
  [part] = counted.read()["parts"]
  assert (part["low_kwh"], part["high_kwh"]) == (pytest.approx(0.07), pytest.approx(0.7))
  assert part["meter"] is None and "libno-such-thing" in part["problem"]


def test_every_chip_has_a_range_or_none():
  for chip in targets.CHIPS.values():
    assert (chip.watts is None) == (chip.idle_watts is None)
    assert chip.watts is None or 0 < chip.idle_watts < chip.watts
    assert targets.of_kind(chip.kind) is not None
  assert targets.of_kind("NVIDIA H200 NVL") is None
