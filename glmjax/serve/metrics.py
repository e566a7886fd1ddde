"""What Prometheus reads at /metrics."""

import prometheus_client

from glmjax.serve import service as service_lib

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_FIGURES = {
  "cache_bytes": "What the caches take of what is answered.",
  "context_bytes": "What contexts take that are kept for who asks again.",
  "draft_tokens": "Tokens read ahead since the model was last started anew.",
  "draft_tokens_right": "Those of them that were right.",
}
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
  """Counts of one server."""

  def __init__(self) -> None:
    """Begins at nothing."""
    self.registry = registry = prometheus_client.CollectorRegistry()
    self.prompt_tokens = prometheus_client.Counter("glmjax_prompt_tokens", "Tokens of prompts.", registry=registry)
    self.new_tokens = prometheus_client.Counter("glmjax_new_tokens", "Tokens generated.", registry=registry)
    self.first_token = prometheus_client.Histogram(
      "glmjax_first_token_seconds", "From a request to its first token.", buckets=_SECONDS, registry=registry
    )
    self.next_token = prometheus_client.Histogram(
      "glmjax_next_token_seconds", "Between two tokens of a request.", buckets=_SECONDS, registry=registry
    )
    self.batch = prometheus_client.Histogram(
      "glmjax_batch_size", "Answers that got tokens in one round.", buckets=_SIZES, registry=registry
    )
    self._waiting = prometheus_client.Gauge("glmjax_waiting", "Answers that wait for a lane.", registry=registry)
    self._running = prometheus_client.Gauge("glmjax_running", "Answers that have a lane.", registry=registry)
    self._figures = {
      name: prometheus_client.Gauge(f"glmjax_{name}", words, registry=registry) for name, words in _FIGURES.items()
    }

  def text(self, service: service_lib.Service) -> bytes:
    """Returns all of it in Prometheus's format, with a service's state as it is now."""
    self._waiting.set(service.waiting)
    self._running.set(service.running)
    for name, value in service.figures().items():
      self._figures[name].set(value)
    return prometheus_client.generate_latest(self.registry)
