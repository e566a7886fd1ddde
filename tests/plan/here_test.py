"""A step compiled for the devices that are here: what lies and what is sent, as the mesh splits it."""

import jax
import pytest

from glmjax import errors
from glmjax import show
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.plan import here
from glmjax.plan import programs

MODEL = config_lib.GLMConfig(vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, max_length=16)
TRAIN = programs.Train(batch_size=8, length=16)
FLOAT = 4  # bytes


@pytest.fixture(scope="module")
def steps():
  return {mesh: here.step(MODEL, TRAIN, mesh) for mesh in ("data=4", "fsdp=4")}


def test_what_lies_on_a_device(steps):
  whole, split = steps["data=4"], steps["fsdp=4"]
  assert whole.mesh["data"] == 4 and split.mesh["fsdp"] == 4
  assert whole.memory["parameters"] == FLOAT * params_lib.count(MODEL)
  assert 2 * FLOAT * params_lib.count(MODEL) <= whole.memory["optimizer"] < 2.1 * FLOAT * params_lib.count(MODEL)
  assert split.memory["optimizer"] < whole.memory["optimizer"] / 2
  kernel = split.parameters["layers"]["mlp"]["wo"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape)[-1] == MODEL.embed_dim // 4


def test_what_is_sent(steps):
  """Of copies the gradients, as a ring's all-reduce sends them: two times three quarters, and some numbers. The table's
  is sent twice: as embedding and as head.
  """
  gradients = FLOAT * (params_lib.count(MODEL) + MODEL.vocab_size * MODEL.embed_dim)
  sent = steps["data=4"].sent()
  assert sent.keys() == {"data"} and {each.kind for each in steps["data=4"].exchanges} == {"all-reduce"}
  assert sent["data"] == pytest.approx(1.5 * gradients, rel=0.01)
  first = steps["fsdp=4"].exchanges[0]
  assert first.name == f"{first.kind} over fsdp" and first.times > 1
  assert sum(each.bytes for each in steps["fsdp=4"].exchanges) == steps["fsdp=4"].sent()["fsdp"]


def test_weights_are_drawn_where_they_lie(steps):
  kernels = [step.parameters["layers"]["mlp"]["wo"]["kernel"] for step in steps.values()]
  first, second = (show.shards(kernel, ("layer", "inner width", "width")) for kernel in kernels[:2])
  assert first.png != second.png
  whole = jax.device_put(jax.numpy.ones((4, 4)), jax.devices()[0])
  assert show.shards(whole, ("down", "across")).png


def test_too_many_devices_are_told():
  with pytest.raises(errors.InputError, match="needs 16 devices, here are 8"):
    here.step(MODEL, TRAIN, "data=16")
