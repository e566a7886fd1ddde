"""Schedules against the original's figures; the plan of batches by its properties."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax import ranges
from glmjax.train import schedules

GLM_130B = schedules.Batches(4_224, ramp_start=192, ramp_increment=24, ramp_samples=5_493_164)


def test_learning_rate_of_glm_130b():
  rate = schedules.LearningRate()
  assert float(rate(0)) == pytest.approx(1e-7)
  assert float(rate(1_098_632)) == pytest.approx(8e-5)
  assert float(rate(1_098_632 // 2)) == pytest.approx((8e-5 + 1e-7) / 2, rel=1e-4)
  assert float(rate((197_753_905 + 1_098_632) // 2)) == pytest.approx((8e-5 + 8e-6) / 2, rel=1e-4)
  assert float(rate(197_753_905)) == float(rate(219_726_562)) == pytest.approx(8e-6)
  assert float(jax.jit(rate)(np.uint32(500_000))) == pytest.approx(float(rate(500_000)))


def test_piecewise_holds_then_rises():
  alpha = schedules.PiecewiseLinear((0, 1_000, 1_500), (0.1, 0.1, 1.0))
  assert [round(float(alpha(s)), 3) for s in (0, 999, 1_250, 1_500, 10**9)] == [0.1, 0.1, 0.55, 1.0, 1.0]
  assert float(schedules.Constant(0.3)(np.uint32(7))) == pytest.approx(0.3)


def test_piecewise_jumps_at_a_sample_given_twice():
  factor = schedules.PiecewiseLinear((89_000_064, 89_000_064, 89_004_288), (1.0, 0.0, 1.0))
  samples = np.array([0, 88_995_840, 89_000_064, 89_002_176, 89_004_288, 2 * 10**8], np.uint32)
  np.testing.assert_allclose([factor(int(s)) for s in samples], [1, 1, 0, 0.5, 1, 1], atol=1e-6)
  np.testing.assert_allclose(jax.jit(factor)(samples), [1, 1, 0, 0.5, 1, 1], atol=1e-6)


def test_piecewise_jumps_at_its_last_sample_too():
  alpha = schedules.PiecewiseLinear((0, 136_033_080, 136_033_080), (0.5, 0.5, 0.1))
  assert [round(float(alpha(136_033_080 + i)), 6) for i in (-1, 0, 1)] == [0.5, 0.1, 0.1]
  assert float(schedules.PiecewiseLinear((5, 5), (1.0, 0.0))(4)) == 1.0
  assert [float(schedules.PiecewiseLinear((7,), (0.3,))(s)) for s in (0, 7, 9)] == pytest.approx([0.3] * 3)
  far = schedules.PiecewiseLinear((4_000_000_000, 4_000_000_010), (0.0, 1.0))
  assert float(far(np.uint32(4_000_000_005))) == pytest.approx(0.5)


def test_joined_and_product_count_absolutely():
  full, half = schedules.LearningRate(peak=8e-5), schedules.LearningRate(peak=4e-5)
  joined = schedules.Joined((full, half, schedules.Constant(1e-6)), (5_000, 9_000))
  warmed = schedules.Product((joined, schedules.PiecewiseLinear((0, 10_000), (0.0, 1.0))))
  for samples, wanted in (
    (0, full(0)),
    (4_999, full(4_999)),
    (5_000, half(5_000)),
    (8_999, half(8_999)),
    (9_000, 1e-6),
    (10**9, 1e-6),
  ):
    for call in (joined, jax.jit(joined)):
      assert float(call(np.uint32(samples))) == pytest.approx(float(wanted), rel=1e-5)
    assert float(warmed(samples)) == pytest.approx(float(wanted) * min(samples / 10_000, 1), rel=1e-5)
  assert joined(np.uint32(3)).dtype == warmed(3).dtype == np.float32


@pytest.mark.parametrize(
  "schedule",
  [
    schedules.Constant(0.1),
    schedules.LearningRate(warmup_samples=ranges.MOST_SAMPLES - 1, decay_samples=ranges.MOST_SAMPLES),
    schedules.PiecewiseLinear((0, ranges.MOST_SAMPLES), (0.1, 1.0)),
    schedules.Joined([schedules.Constant(1.0), schedules.Constant(2.0)], [3_000_000_000]),
    schedules.Product([schedules.Constant(2.0), schedules.LearningRate()]),
  ],
)
@pytest.mark.parametrize("samples", [0, 2**31 - 1, 2**31, 3_000_000_000, ranges.MOST_SAMPLES])
def test_any_sample_as_a_number_and_in_a_program(schedule, samples):
  """A run may have more of them than an int32 holds."""
  value = schedule(samples)
  assert value.dtype == jnp.float32 and value.shape == ()
  np.testing.assert_array_equal(value, schedule(jnp.uint32(samples)))
  np.testing.assert_allclose(value, jax.jit(lambda x: schedule(x))(jnp.uint32(samples)), rtol=1e-6)


def test_ramp_of_glm_130b():
  ramp = list(itertools.takewhile(lambda at: at[1] < 4_224, GLM_130B.plan()))
  assert ramp[0] == (0, 192)
  assert len({size for _, size in ramp}) == 168
  assert all(a[0] + a[1] == b[0] for a, b in itertools.pairwise(ramp))
  assert len(ramp) == pytest.approx(4_296, abs=2)
  # 49,300 iterations end at 195.6 M samples, 400.6 G tokens (docs/sources.md)
  samples = ramp[-1][0] + ramp[-1][1] + (49_300 - len(ramp)) * 4_224
  assert math.isclose(samples, 195.6e6, rel_tol=1e-3)


def test_plan_goes_on_from_anywhere():
  batches = schedules.Batches(64, 16, 8, 3_000, skip=[(500, 700), (701, 702), (1_000, 1_000)])
  steps = list(itertools.islice(batches.plan(), 100))
  for i in (1, 20, 57):
    first, size = steps[i - 1]
    assert list(itertools.islice(batches.plan(first + size), 100 - i)) == steps[i:]
  assert next(batches.plan(10**9)) == (10**9, 64)


def test_skipped_samples_are_never_used():
  batches = schedules.Batches(24, skip=[(500, 700), (100, 100)])
  used = [sample for first, size in itertools.islice(batches.plan(), 60) for sample in range(first, first + size)]
  assert not set(used) & (set(range(500, 701)) | {100})
  assert used == sorted(set(used))
  assert 701 in used and 101 in used


@pytest.mark.parametrize(
  "make",
  [
    lambda: schedules.Batches(0),
    lambda: schedules.Batches(100, 16, 24, 10),
    lambda: schedules.Batches(8, skip=[(5, 4)]),
    lambda: schedules.LearningRate(warmup_samples=10, decay_samples=10),
    lambda: schedules.PiecewiseLinear((5, 1), (0, 1)),
    lambda: schedules.Product(()),
    lambda: schedules.Joined((schedules.Constant(), schedules.Constant()), ()),
    lambda: schedules.Joined((schedules.Constant(),) * 3, (5, 4)),
  ],
)
def test_mistakes(make):
  with pytest.raises(errors.InputError) as caught:
    make()
  assert "\n" not in str(caught.value)
