"""What the settings of a run tell by themselves, looked at before anything is read or deleted."""

from glmjax import errors
from glmjax import ranges
from glmjax.models import config as config_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.train import base as base_lib
from glmjax.train import feed as feed_lib
from glmjax.train import objective as objective_lib
from glmjax.train import pipeline as pipeline_lib
from glmjax.train import preference as preference_lib
from glmjax.train import schedules


def rows(model: config_lib.GLMConfig, data: feed_lib.DataSource, loss_mean_of: str) -> None:
  """Raises InputError where the model has no room for the data's rows, or nobody knows what the loss is a mean of."""
  if data.seq_length > model.max_length:
    raise errors.InputError(
      f"the data's rows have {data.seq_length} tokens, the model's max_length is {model.max_length}: change either"
    )
  if loss_mean_of not in objective_lib.MEANS:
    raise errors.InputError(f"loss_mean_of is {loss_mean_of!r}: use one of {', '.join(objective_lib.MEANS)}")


def numbers(
  batches: schedules.Batches,
  total_samples: int,
  micro_batch: int | None,
  loss_chunk: int,
  seed: int,
  stop_at_step: int | None,
) -> None:
  """Raises InputError where a number is out of its range."""
  ranges.whole("loop.train.total_samples", total_samples, 1, ranges.MOST_SAMPLES - batches.size)
  ranges.whole("loop.train.loss_chunk", loss_chunk, 1)
  ranges.whole("loop.train.seed", seed, 0, 2**32 - 1)
  for name, value in (("micro_batch", micro_batch), ("stop_at_step", stop_at_step)):
    if value is not None:
      ranges.whole(f"loop.train.{name}", value, 1)


def preference(
  preference: preference_lib.Preference | None,
  data: feed_lib.DataSource,
  base: base_lib.Base | None,
  mesh: mesh_lib.MeshConfig,
) -> None:
  """Raises InputError where data and loss are not both of pairs of answers, or the loss cannot be computed."""
  kind("data", data, preference)
  if preference is None:
    return
  if mesh.stage > 1:
    raise errors.InputError(f"pairs of answers do not go through pipelines: give a mesh without stage={mesh.stage}")
  if preference.compares and base is None:
    raise errors.InputError(
      f"{type(preference).__name__} compares with the model that an adapter is trained beside: give "
      "loop.train.trainable, or use preference.ORPO, which compares with none"
    )


def kind(name: str, data: feed_lib.DataSource, preference: preference_lib.Preference | None) -> None:
  """Raises InputError where loop.train's argument of that name is not of what the loss is of."""
  if bool(data.describe().get("preference")) != (preference is not None):
    raise errors.InputError(
      f"loop.train.{name} is of pairs of answers: give loop.train.preference a loss of them (preference.DPO or "
      "preference.ORPO)"
      if preference is None
      else f"loop.train.preference is a loss of pairs of answers: give loop.train.{name} such (mixtures.preference)"
    )


def embedding(alpha: schedules.Schedule, base: base_lib.Base | None) -> None:
  """Raises InputError where the gradient of an embedding is to be shrunk that has none."""
  if base is not None and alpha != schedules.Constant(1.0):
    raise errors.InputError(
      "loop.train.embedding_alpha shrinks the embedding's gradient, and beside an adapter (loop.train.trainable) the "
      "embedding has none: leave it out"
    )


def layers(every: int, flow: pipeline_lib.Pipeline | None) -> None:
  """Raises InputError where layers lie on stages, and all are to be looked into: no device has them."""
  if every and flow is not None:
    raise errors.InputError(
      f"Intervals.layers = {every} looks into layers one behind the other, which does not go through pipelines: give a "
      f"mesh without stage={flow.stages}, or Intervals.layers = 0"
    )
