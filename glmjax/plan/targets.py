"""The hardware that plans are made for: memory, rates and links of each chip, with where each figure is from.

Rates are the makers' peaks, bytes and FLOPs a second, one direction of a link. Nothing here is fitted to a measurement.
"""

import dataclasses
import math
import re

from glmjax import errors

GIB = 1 << 30
RESERVED = 0.06  # of a GPU's memory: CUDA's context, command buffers, fragments


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one device has and does, by its maker's figures."""

  kind: str  # as JAX names it
  platform: str  # "cuda" or "tpu"
  memory_bytes: int
  peak_flops: float  # dense, of half-precision products with float32 sums
  memory_bandwidth: float
  inner_links: float  # to the devices of the same node (NVLink, PCIe), or to the slice (ICI, all links of a chip)
  outer_links: float  # to other nodes, each device's share; to other slices (data-center network)
  host_link: float  # from the host's memory
  inner_hop: float  # seconds that an exchange's message takes from one device to the next, within
  outer_hop: float  # and between nodes
  start: float  # seconds that an exchange takes to begin
  node: int  # GPUs of a node; 0 of TPUs, whose slices have no nodes
  watts: float | None  # most that the maker allows it; None: it does not say
  idle_watts: float | None  # least that it draws when it is on
  compute_capability: tuple[int, int] = (0, 0)
  cores: int = 0  # streaming multiprocessors
  shared_memory: int = 0  # bytes that a thread block may ask for
  l2_cache: int = 0
  fpus: int = 64  # float32 units of a core
  clock_ghz: float = 1.4
  topology: str = ""  # name of the TPU generation for libtpu
  slice_dimensions: int = 0  # of a TPU slice's torus


# What idle GPUs draw, of the most that they may, in listings of nvidia-smi that people have published: A100 42 to 52 of
# 400 W, H100 69 to 72 of 700 W, GeForce RTX 4090 15 to 25 of 450 W.
_IDLE, _IDLE_GEFORCE = 0.1, 0.03


def _gpu(
  kind: str,
  gib: float,
  tflops: float,
  gbps: float,
  links: tuple[float, ...],
  watts: float,
  capability: tuple[int, int],
  cores: int,
  shared: int,
  l2_mib: float,
  fpus: int,
  clock: float,
) -> Chip:
  inner, outer, hop, host = links
  return Chip(
    kind,
    "cuda",
    round(gib * GIB),
    tflops * 1e12,
    gbps * 1e9,
    inner * 1e9,
    outer * 1e9,
    host * 1e9,
    hop,
    2.7e-6,
    3.6e-6,
    8,
    watts,
    watts * (_IDLE_GEFORCE if "GeForce" in kind else _IDLE),
    capability,
    cores,
    shared,
    round(l2_mib * (1 << 20)),
    fpus,
    clock,
  )


# Memory as drivers report it. A100, H100, H200, V100: NVIDIA's datasheets (SXM parts). RTX: the GA102 and TU102 white
# papers, tensor-core rates with float32 sums (GeForce halves them). Links, GB/s in a direction: NVLink 2, 3, 4: 150,
# 300, 450; PCIe 3 and 4 x16 of the GeForce cards: 16 and 32. To other nodes: DGX-A100 and DGX-H100 have eight 200 and
# 400 Gb/s adapters, DGX-1V four of 100; 100 Gb/s a node is taken for GeForce machines. Microseconds of small messages
# are those by which NCCL itself chooses (src/graph/tuning.cc, rings, protocol LL): 3.6 to begin, then a hop 0.47 over
# NVLink, 1.0 over PCIe, 2.7 over a network. Last, from the host: PCI-SIG's rates of 16 lanes of PCIe 3, 4 and 5, a link
# for each card (in DGX machines two cards share a switch's: half of it each where both read).
_VOLTA_DGX, _AMPERE_DGX, _HOPPER_DGX = (150, 6.25, 0.47e-6, 16), (300, 25, 0.47e-6, 32), (450, 50, 0.47e-6, 64)
_GEFORCE, _TURING = (32, 1.56, 1e-6, 32), (16, 1.56, 1e-6, 16)
_GPUS = {
  "a100-40": _gpu("NVIDIA A100-SXM4-40GB", 39.4, 312, 1_555, _AMPERE_DGX, 400, (8, 0), 108, 166_912, 40, 64, 1.41),
  "a100-80": _gpu("NVIDIA A100-SXM4-80GB", 79.1, 312, 2_039, _AMPERE_DGX, 400, (8, 0), 108, 166_912, 40, 64, 1.41),
  "h100": _gpu("NVIDIA H100 80GB HBM3", 79.1, 989.4, 3_352, _HOPPER_DGX, 700, (9, 0), 132, 232_448, 50, 128, 1.98),
  "h200": _gpu("NVIDIA H200", 139.8, 989.4, 4_800, _HOPPER_DGX, 700, (9, 0), 132, 232_448, 60, 128, 1.98),
  "v100-32": _gpu("Tesla V100-SXM2-32GB", 31.7, 125, 900, _VOLTA_DGX, 300, (7, 0), 80, 98_304, 6, 64, 1.53),
  "rtx3090": _gpu("NVIDIA GeForce RTX 3090", 23.7, 71, 936, _GEFORCE, 350, (8, 6), 82, 101_376, 6, 128, 1.70),
  "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 23.6, 165, 1_008, _GEFORCE, 450, (8, 9), 128, 101_376, 72, 128, 2.52),
  "rtx2080ti": _gpu("NVIDIA GeForce RTX 2080 Ti", 10.75, 53.8, 616, _TURING, 260, (7, 5), 68, 65_536, 5.5, 64, 1.55),
}


def _tpu(
  name: str,
  kind: str,
  gib: float,
  tflops: float,
  gbps: float,
  ici: float,
  dimensions: int,
  watts: tuple[float, float] | tuple[None, None] = (None, None),
) -> Chip:
  return Chip(
    kind,
    "tpu",
    round(gib * GIB),
    tflops * 1e12,
    gbps * 1e9,
    ici * 1e9,
    25e9 / 4,
    15e9,
    1e-6,
    1e-6,
    0.0,
    0,
    *watts,
    topology=name,
    slice_dimensions=dimensions,
  )


# Google Cloud's pages of each generation: memory, peak bf16, HBM, and the inter-chip bandwidth of all links of a chip,
# both directions together: 2,400, 1,600, 4,800 and 3,584 Gb/s; halved here. A hop takes about a microsecond, and PCIe
# from the host gives 15 GB/s ("How to Scale Your Model", Google DeepMind, on rooflines of collectives and on TPUs).
# Watts of v4: most and least measured, its page too; of the others Google has published none.
_TPUS = {
  "v4": _tpu("v4", "TPU v4", 32, 275, 1_228, 150, 3, (192, 90)),
  "v5e": _tpu("v5e", "TPU v5 lite", 16, 197, 819, 100, 2),
  "v5p": _tpu("v5p", "TPU v5", 95, 459, 2_765, 300, 3),
  "v6e": _tpu("v6e", "TPU v6 lite", 32, 918, 1_640, 224, 2),
}
CHIPS = _GPUS | _TPUS


def of_kind(kind: str) -> Chip | None:
  """Returns the chip that JAX calls `kind`; None: not one of these, of which nothing is guessed."""
  return next((chip for chip in CHIPS.values() if chip.kind == kind), None)


def room(chip: Chip) -> int:
  """Returns the bytes of its memory that a program may take."""
  return math.floor(chip.memory_bytes * (1 - RESERVED if chip.platform == "cuda" else 1))


@dataclasses.dataclass(frozen=True)
class Target:
  """A number of devices of one chip."""

  name: str  # as given: "a100-40:768", "v5p:4x8x8"
  chip: Chip
  devices: int
  shape: tuple[int, ...]  # of a TPU slice; (nodes, devices of a node) of GPUs


def parse(name: str) -> Target:
  """Returns a target by its name: a GPU and how many, or a TPU generation and a slice's shape.

  Raises:
    errors.InputError: for a name that is not known, naming those that are.
  """
  chip_name, _, size = name.partition(":")
  chip = CHIPS.get(chip_name)
  numbers = size.split("x") if size else ["1"]
  if chip is None or not all(re.fullmatch("[0-9]{1,6}", n) and int(n) for n in numbers):
    raise errors.InputError(
      f"target {name[:60]!r} is not known: give GPU:NUMBER or TPU:SHAPE, as in a100-40:768 or "
      f"v5p:4x8x8, with one of {', '.join(CHIPS)}"
    )
  shape = tuple(map(int, numbers))
  if chip.platform == "tpu":
    if len(shape) != chip.slice_dimensions:
      raise errors.InputError(
        f"target {name!r}: a {chip_name} slice has {chip.slice_dimensions} dimensions, as in "
        f"{chip_name}:{'x'.join(['4'] * chip.slice_dimensions)}"
      )
    return Target(name, chip, math.prod(shape), shape)
  if len(shape) != 1:
    raise errors.InputError(f"target {name!r}: give the number of GPUs alone, as in {chip_name}:8")
  count = shape[0]
  if count > chip.node and count % chip.node:
    raise errors.InputError(f"target {name!r}: more than {chip.node} GPUs come in nodes of {chip.node}")
  return Target(name, chip, count, (max(1, count // chip.node), min(count, chip.node)))
