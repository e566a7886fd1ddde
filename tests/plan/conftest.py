"""The processors here in place of a target's devices, so that plans need no compiler but theirs."""

import jax
import pytest

from glmjax.models import config as config_lib
from glmjax.plan import devices


@pytest.fixture
def here(monkeypatch):
  monkeypatch.setattr(devices, "of", lambda target: jax.devices()[: target.devices])


@pytest.fixture
def tiny():
  return config_lib.GLMConfig(vocab_size=256, num_layers=4, embed_dim=32, num_heads=4, mlp_dim=64, max_length=64)
