"""The named models have the sizes that their names and papers say."""

import pytest

from glmjax.config import gin_files
from glmjax.models import params as params_lib

gin = pytest.importorskip("gin")

EXACT = {"glm_130b": 128_697_794_560, "chatglm_6b": 6_173_286_400}
ROUGH = {
  "glm_110m": 110e6,
  "glm_335m": 335e6,
  "glm_410m": 410e6,
  "glm_515m": 515e6,
  "glm_2b": 1.92e9,
  "glm_10b": 9.88e9,
  "glm_10b_chinese": 9.88e9,
}


@pytest.fixture(autouse=True)
def clean():
  gin.clear_config()
  yield
  gin.clear_config()


def parse(name: str):
  """The GLMConfig of gin/models/NAME.gin."""
  gin.parse_config_file(str(gin_files.packaged_folder() / "models" / f"{name}.gin"))
  return gin.query_parameter("MODEL/gin.macro.value").scoped_configurable_fn()


@pytest.mark.parametrize("name, count", EXACT.items())
def test_exact_count(name: str, count: int):
  assert params_lib.count(parse(name)) == count


@pytest.mark.parametrize("name, count", ROUGH.items())
def test_count_agrees_with_the_name(name: str, count: float):
  assert params_lib.count(parse(name)) == pytest.approx(count, rel=0.02)


def test_every_file_is_a_model():
  names = [path.stem for path in (gin_files.packaged_folder() / "models").glob("*.gin")]
  assert {*EXACT, *ROUGH, "tiny"} <= set(names)
  for name in names:
    gin.clear_config()
    assert parse(name).vocab_size % 32 == 0
