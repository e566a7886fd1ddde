"""Every numeric setting has a range: what lies outside is refused where it is given, in one line that names it."""

import dataclasses
import math

import numpy as np
import pytest

from glmjax import errors
from glmjax import ranges
from glmjax.models import config as config_lib
from glmjax.parallel import mesh
from glmjax.parallel import peers
from glmjax.train import loop
from glmjax.train import optimizer
from glmjax.train import pipeline
from glmjax.train import schedules
from glmjax.train import spikes
from glmjax.train import state
from glmjax.train import preference
from glmjax.train import trainable

MODEL = dict(vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48)
NEVER = (math.nan, math.inf, -math.inf, -1e-9, 1e308, "0.1", None, True, 10**400)
NOT_WHOLE = (-2, 0.5, 2.0, math.nan, math.inf, "2", True, 2**40, 10**5000)


@dataclasses.dataclass(frozen=True)
class Setting:
  """A field, how to make its class with a value, good values, bad ones beside those of its kind."""

  make: object
  name: str
  good: tuple
  bad: tuple = ()
  whole: bool = False
  optional: bool = False


def field(kind, name: str, good: tuple, bad: tuple = (), prefix: str = "", /, **more) -> Setting:
  rest = {key: more.pop(key) for key in list(more) if key not in ("whole", "optional")}
  return Setting(lambda value: kind(**rest | {name: value}), f"{prefix or kind.__name__}.{name}", good, bad, **more)


SETTINGS = [
  field(optimizer.AdamW, "b1", (0, 0.9), (1, 5)),
  field(optimizer.AdamW, "b2", (0.95, np.float32(0.5)), (1, 5)),
  field(optimizer.AdamW, "epsilon", (1e-8,), (0, 1e-45)),
  field(optimizer.AdamW, "weight_decay", (0, 0.1)),
  field(optimizer.AdamW, "clip_norm", (1, 1e9), (0,)),
  field(optimizer.Muon, "momentum", (0, 0.95), (1, 5)),
  field(optimizer.Muon, "steps", (5,), (0, 1000), whole=True),
  field(optimizer.Muon, "update_size", (0.2,), (0,)),
  field(schedules.LearningRate, "peak", (1e-3,), initial=0, minimum=0),
  field(schedules.LearningRate, "minimum", (0, 8e-5), (9e-5,)),
  field(schedules.LearningRate, "initial", (0, 1e-7), (9e-5,)),
  field(schedules.LearningRate, "warmup_samples", (0, 5), (10,), whole=True, decay_samples=10),
  field(schedules.LearningRate, "decay_samples", (11,), (0, 10), whole=True, warmup_samples=10),
  field(schedules.Constant, "value", (0, 1.0)),
  Setting(lambda value: schedules.PiecewiseLinear((0, 5), (0.1, value)), "PiecewiseLinear.values[1]", (0, 1)),
  Setting(
    lambda value: schedules.PiecewiseLinear((0, value), (0.1, 1)), "PiecewiseLinear.samples[1]", (5,), whole=True
  ),
  Setting(
    lambda value: schedules.Joined([schedules.Constant()] * 2, [value]), "Joined.boundaries[0]", (5,), whole=True
  ),
  field(schedules.Batches, "size", (1, 4_224), (0,), whole=True),
  field(schedules.Batches, "ramp_start", (8,), (0, 17), whole=True, optional=True, size=16),
  field(schedules.Batches, "ramp_increment", (4,), (0, 3), whole=True, size=16, ramp_start=8),
  field(schedules.Batches, "ramp_samples", (0, 99), whole=True, size=16),
  Setting(lambda value: schedules.Batches(8, skip=[(0, value)]), "Batches.skip[0]", (5,), whole=True),
  field(state.DynamicLossScale, "start", (1, 65_536), (0, 0.5)),
  field(state.DynamicLossScale, "minimum", (1,), (0, 1e6)),
  *[field(state.DynamicLossScale, name, (1,), (0,), whole=True) for name in ("window", "hysteresis")],
  *[field(loop.Intervals, name, (0, 5), whole=True) for name in ("log", "evaluate", "save", "layers")],
  *[field(loop.Intervals, name, (1,), (0,), whole=True) for name in ("keep", "eval_samples")],
  Setting(lambda value: loop.Intervals(profile=(1, value)), "Intervals.profile", (2,), (0,), whole=True),
  field(spikes.Guard, "window", (32, 128), (1, 31), whole=True),
  field(spikes.Guard, "least", (2, 128), (1, 129), whole=True),
  *[field(spikes.Guard, name, (0.01, 6), (0,)) for name in ("sigmas", "loss_floor", "gradient_floor", "update_floor")],
  field(spikes.Guard, "most", (0, 10), whole=True),
  Setting(lambda value: spikes.Guard(skip=[(0, value)]), "Guard.skip[0]", (5,), whole=True),
  field(pipeline.PipelineConfig, "microbatches", (4,), (0,), "pipeline.PipelineConfig", whole=True, optional=True),
  field(pipeline.PipelineConfig, "rounds", (2,), (0,), "pipeline.PipelineConfig", whole=True, kind="gpipe"),
  *[
    Setting(
      lambda value, axis=axis: mesh.MeshConfig(**{"data": -1, axis: value}).sizes(8),
      f"MeshConfig.{axis}",
      (1, 2),
      (0,),
      whole=True,
    )
    for axis in mesh.AXES[1:]
  ],
  field(peers.Watch, "silent_seconds", (30,), (0.5,)),
  field(peers.Watch, "hung_seconds", (0, 900)),
  *[
    field(
      config_lib.GLMConfig,
      name,
      (MODEL.get(name, 64),),
      (0,),
      whole=True,
      **{key: value for key, value in MODEL.items() if key != name},
    )
    for name in (*MODEL, "max_length")
  ],
  field(config_lib.GLMConfig, "prefix_length", (0, 3), whole=True, **MODEL),
  field(config_lib.GLMConfig, "prefix_hidden", (0, 3), whole=True, prefix_length=2, **MODEL),
  field(config_lib.GLMConfig, "lora_rank", (1, 8), whole=True, lora_kernels="mlp/wo", **MODEL),
  field(config_lib.GLMConfig, "lora_scale", (0.5, 16), (0,), **MODEL),
  *[
    field(config_lib.GLMConfig, name, (0, 0.1), (1,), **MODEL)
    for name in ("hidden_dropout", "attention_dropout", "prefix_dropout", "lora_dropout")
  ],
  field(preference.DPO, "beta", (0.01, 1), (0,)),
  field(preference.ORPO, "weight", (0, 1), (-1,)),
  field(trainable.LoRA, "rank", (1, 8), (0,), whole=True),
  field(trainable.LoRA, "alpha", (0.5, 16), (0,)),
  *[field(kind, "dropout", (0, 0.1), (1,)) for kind in (trainable.LoRA, trainable.PTuning)],
  field(trainable.PTuning, "length", (1, 128), (0,), whole=True),
  *[
    field(config_lib.GLMConfig, name, (1e-5, 1), (0, 1e-45), **MODEL)
    for name in ("layer_norm_epsilon", "rotary_base", "init_std")
  ],
  field(config_lib.GLMConfig, "layer_norm_epsilon", (1e-5,), (2,), **MODEL),
  field(config_lib.GLMConfig, "residual_alpha", (1, 7.5), (0,), optional=True, **MODEL),
  field(config_lib.GLMConfig, "activation_bits", (8,), (4, 0), whole=True, optional=True, **MODEL),
  field(config_lib.GLMConfig, "head_bits", (8, 4), (2, 0), whole=True, optional=True, **MODEL),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=[setting.name for setting in SETTINGS])
def test_what_is_outside_of_a_setting_s_range_is_refused(setting):
  for value in setting.good:
    setting.make(value)
  wrong = [*setting.bad, *(NOT_WHOLE if setting.whole else NEVER)]
  for value in wrong:
    if value is None and setting.optional:
      continue
    with pytest.raises(errors.InputError) as caught:
      setting.make(value)
    message = str(caught.value)
    assert message.startswith(
      setting.name.split(".")[0] if "pipeline" not in setting.name else "pipeline.PipelineConfig"
    )
    assert "\n" not in message and len(message) < 250, message


def test_every_number_of_a_dataclass_of_settings_is_among_them():
  """So that a new setting without a range is noticed."""
  known = {setting.name.removeprefix("pipeline.").split("[")[0] for setting in SETTINGS}
  classes = (
    optimizer.AdamW,
    optimizer.Muon,
    schedules.LearningRate,
    schedules.Constant,
    schedules.PiecewiseLinear,
    schedules.Joined,
    schedules.Batches,
    state.DynamicLossScale,
    loop.Intervals,
    spikes.Guard,
    pipeline.PipelineConfig,
    peers.Watch,
    config_lib.GLMConfig,
    preference.DPO,
    preference.ORPO,
    trainable.LoRA,
    trainable.PTuning,
  )
  for kind in classes:
    for each in dataclasses.fields(kind):
      if any(word in str(each.type) for word in ("int", "float")):
        assert f"{kind.__name__}.{each.name}" in known, each.name


def test_words_for_flags_are_no_flags():
  for name in ("causal", "tie_embeddings", "embedding_norm", "scan_layers"):
    with pytest.raises(errors.InputError, match=f"GLMConfig.{name} is 'no': give True or False"):
      config_lib.GLMConfig(**MODEL, **{name: "no"})
  with pytest.raises(errors.InputError, match=r"GLMConfig.norm is \['pre'\]: choose one of"):
    config_lib.GLMConfig(**MODEL, norm=["pre"])


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((5, 0, 1), "x is 5: give a number from 0 to 1"),
    ((math.nan, 0), "x is nan: give a number, 0 or more"),
    ((1, -5.5), None),
    ((math.inf,), "x is inf: give a finite number"),
    ((1e39,), "x is 1e[+]39: give a finite number .float32 ends at 3.4e38."),
  ],
)
def test_numbers(arguments, message):
  if message is None:
    return ranges.number("x", *arguments)
  with pytest.raises(errors.InputError, match=f"^{message}$"):
    ranges.number("x", *arguments)


def test_ends_that_are_not_included():
  for keywords, value, message in (
    ({"below": 1}, 1, "x is 1: give a number from 0 to below 1"),
    ({"above": 0}, 0.0, "x is 0.0: give a number above 0"),
    ({"above": 0, "most": 1}, 2, "x is 2: give a number above 0, up to 1"),
    ({"above": 0, "below": 1}, 1.0, "x is 1.0: give a number above 0 and below 1"),
  ):
    with pytest.raises(errors.InputError, match=f"^{message}$"):
      ranges.number("x", value, 0, **keywords)
  with pytest.raises(errors.InputError, match="^x is a number of 5001 digits: give a whole number from 1 to 9$"):
    ranges.whole("x", 10**5000, 1, 9)
