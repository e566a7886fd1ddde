"""The device mesh: five named axes, sized in gin."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from glmjax import errors
from glmjax import ranges

AXES = ("data", "fsdp", "stage", "tensor", "context")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis; one axis may be -1 and takes the devices that are left."""

  data: int = -1  # copies of the model, each with its own rows
  fsdp: int = 1  # rows too, with weights and optimizer state split
  stage: int = 1  # pipeline stages
  tensor: int = 1  # heads, mlp and vocabulary split
  context: int = 1  # tokens of a row split

  def sizes(self, num_devices: int) -> tuple[int, ...]:
    """Returns the sizes in the order of AXES, -1 filled in.

    Raises:
      errors.InputError: when they do not multiply to `num_devices`.
    """
    for axis in AXES:
      if getattr(self, axis) != -1:
        ranges.whole(f"MeshConfig.{axis}", getattr(self, axis), 1)
    sizes = [getattr(self, axis) for axis in AXES]
    shown = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes) if size != 1) or "data=1"
    if sizes.count(-1) > 1:
      raise errors.InputError(f"mesh {shown}: only one size can be -1, all devices that the others leave")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
      if num_devices % known:
        raise errors.InputError(
          f"mesh {shown}: the {num_devices} devices here do not divide by {known}; "
          "change the sizes in the mesh's gin file"
        )
      sizes[sizes.index(-1)] = num_devices // known
    elif known != num_devices:
      raise errors.InputError(
        f"mesh {shown} needs {known} devices, here are {num_devices}: "
        "change the sizes, or set one to -1 to take what there is"
      )
    return tuple(sizes)


def parse(text: str) -> MeshConfig:
  """Returns the mesh that a user wrote: AXIS=SIZE, separated by commas, as "data=2,tensor=4"; other axes are 1.

  Raises:
    errors.InputError: when it is not of that form.
  """
  sizes: dict[str, int] = {}
  for part in text.split(","):
    axis, _, size = part.strip().partition("=")
    if axis not in AXES or axis in sizes or not size.removeprefix("-").isdecimal():
      raise errors.InputError(f"mesh {text}: give sizes of {', '.join(AXES)}, as tensor=4 or data=2,tensor=4")
    sizes[axis] = int(size)
  return MeshConfig(**{"data": 1} | sizes)


def given(mesh: MeshConfig | str | None) -> MeshConfig | None:
  """Returns the mesh of what a caller gave: as it is, or a text as `parse` reads it.

  Raises:
    errors.InputError: when it is neither, nor None.
  """
  if isinstance(mesh, str):
    return parse(mesh)
  if mesh is not None and not isinstance(mesh, MeshConfig):
    raise errors.InputError(f"mesh is {repr(mesh)[:60]}: give text, as 'tensor=4', or a MeshConfig")
  return mesh


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Makes a mesh over `devices` (all by default), with Auto axes: jit chooses what the rules leave open."""
  devices = jax.devices() if devices is None else list(devices)
  sizes = config.sizes(len(devices))
  split = devices[0].platform == "tpu"  # an axis may be a part of a slice's dimension, as 8 of 16
  try:
    found = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=split)
  except NotImplementedError as error:
    shown = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes) if size != 1)
    kind = devices[0].device_kind
    raise errors.InputError(
      f"mesh {shown} does not lie on a slice of {len(devices)} {kind}: make each "
      "axis a product of divisors of the slice's dimensions, as 32 and 8 on 16x16"
    ) from error
  return Mesh(found, AXES, axis_types=(AxisType.Auto,) * len(AXES))
