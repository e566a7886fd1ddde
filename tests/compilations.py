"""Which programs XLA compiles, for tests that say that none is left to be."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def noted() -> Iterator[list[str]]:
  """Yields a list that grows by each program that is compiled meanwhile."""
  compiled: list[str] = []

  def note(event: str, _: float, **about: str) -> None:
    if event.endswith("backend_compile_duration"):
      compiled.append(about.get("fun_name", event))

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    yield compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
