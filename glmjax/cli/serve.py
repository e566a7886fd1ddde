"""The serve command: a model behind OpenAI's interface, and a page to chat with it."""

import dataclasses
import logging
from typing import TYPE_CHECKING

from glmjax import errors
from glmjax.cli import inference
from glmjax.io import paths

if TYPE_CHECKING:
  from glmjax.infer import engine as engine_lib
  from glmjax.infer import scheduler as scheduler_lib

_log = logging.getLogger("glmjax")


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the server takes at a time."""

  lanes: int = 8  # requests in one program
  requests: int = 64  # that are answered at the same time
  queue: int = 256  # that wait beside those
  cache_gib: float | None = None  # memory for what is answered at the same time; None: half of what the model leaves
  body_bytes: int = 1 << 20  # of a request
  drain_seconds: float = 60.0  # for running answers, once a signal has come

  def capacity(self, model: "engine_lib.Engine") -> "scheduler_lib.Capacity":
    """Returns how much the model answers at the same time.

    Half of the memory that is left is for caches that grow, which are there twice then, and for prompts that are read.
    """
    from glmjax.infer import scheduler  # here, as this module is looked at before a command is in order

    free, lanes = model.runner.free_bytes(), min(self.lanes, self.requests)
    cache_bytes = free and free // 2 if self.cache_gib is None else int(self.cache_gib * 2**30)
    if cache_bytes is not None:
      fit = scheduler.lanes_that_fit(model.runner, lanes, cache_bytes, model.drafts)
      if fit < lanes:
        _log.warning("lanes: %d, as %d would have no room for long texts in %.1f GiB", fit, lanes, cache_bytes / 2**30)
      lanes = fit
    return scheduler.Capacity(lanes, self.requests, cache_bytes, few_programs=True)


def serve(
  checkpoint: paths.Named,
  host: str = "127.0.0.1",
  port: int = 8000,
  name: str | None = None,
  api_keys: paths.Named | None = None,
  log_prompts: bool = False,
  limits: Limits = Limits(),
  drafting: inference.Drafting = inference.Drafting(),
  devices: inference.Devices = inference.Devices(),
) -> None:
  """Serves a model until SIGTERM or SIGINT; running answers may end first.

  Args:
    checkpoint: a training run's or an exported model's folder.
    host: where to listen; by default only this machine reaches it.
    port: of it; 0: any that is free.
    name: what requests call the model; None: the folder's name.
    api_keys: a file of keys, one a line; who sends none of them is refused. None: everybody is answered.
    log_prompts: whether the log has what is asked, not only how much.
    limits: what is taken at a time.
    drafting: what lanes that are free read ahead; here 7 tokens, unless it says otherwise.
    devices: where the model lies, and the adapters beside it: one is always on, or requests name one as their model.
  """
  if not 0 <= port < 1 << 16:
    raise errors.InputError(f"--port is {port}: give one from 0 to 65535")
  checkpoint = inference.model_folder(checkpoint)
  from glmjax.infer import adapters, scheduler
  from glmjax.serve import app, limits as limits_lib, run  # here: they need packages of the extra "serve"

  called = name or checkpoint.name
  app.check_names(called, adapters.names(devices.adapters))
  keys = run.read_keys(api_keys) if api_keys is not None else []
  if not keys and host not in run.LOCAL:
    _log.warning("anybody who reaches %s is answered: give --api_keys, or let a proxy look after that", host)
  if drafting.drafts is None:
    drafting = dataclasses.replace(drafting, drafts=inference.DRAFTS)
  likely = scheduler.Capacity(min(limits.lanes, limits.requests), few_programs=True, drafts=drafting.count)
  model = devices.load(checkpoint, drafting, run.first(likely))
  server = app.Server(model, called, limits.capacity(model), limits.queue, keys)
  if model.adapters:
    _log.info("models to ask for: %s", ", ".join(server.names))
  routes = app.create(server, limits_lib.Limits(limits.body_bytes), log_prompts)
  run.run(server, routes, host, port, limits.drain_seconds)
