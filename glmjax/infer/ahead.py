"""Programs compiled ahead: those of the first answers, from shapes alone, while the weights are being read.

What is compiled here is found in JAX's own memory when it is called; where the guess was wrong, nothing but time is
lost. Two threads: one takes the decoding, the other all that comes before it.
"""

import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from glmjax import errors
from glmjax.checkpoint import files
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import source as source_lib
from glmjax.infer import decode
from glmjax.infer import filling
from glmjax.infer import lanes as lanes_lib
from glmjax.infer import placement as placement_lib
from glmjax.infer import prefill
from glmjax.infer import reader
from glmjax.infer import rows as rows_lib
from glmjax.infer import sampling as sampling_lib
from glmjax.infer import scheduler
from glmjax.io import paths
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib


@dataclasses.dataclass(frozen=True)
class First:
  """What a model will be asked first."""

  prompts: Sequence[str]
  max_tokens: int
  sampling: sampling_lib.Sampling = sampling_lib.Sampling()
  capacity: scheduler.Capacity | None = None  # of the scheduler that will answer; None: a lane for each prompt


@contextlib.contextmanager
def compiling(
  first: First | None,
  folder: paths.Named,
  placement: placement_lib.Placement,
  precision: placement_lib.Precision = placement_lib.Precision(),
  offload_layers: int = 0,
) -> Iterator[None]:
  """Compiles, while its block reads the model of a folder, what answering `first` will call; None: nothing.

  The block's end waits for it. What is wrong with the folder or the prompts is told by who reads and asks.
  """
  programs = None
  if first is not None:
    with contextlib.suppress(errors.InputError, files.DamagedError, OSError):
      programs = _programs(first, folder, placement, precision, offload_layers)
  if programs is None:
    yield
    return
  with concurrent.futures.ThreadPoolExecutor(2, "compile") as pool:
    for chain in (programs.decoding, programs.reading):
      pool.submit(chain)
    yield


def _programs(
  first: First,
  folder: paths.Named,
  placement: placement_lib.Placement,
  precision: placement_lib.Precision,
  offload_layers: int,
) -> "_Programs | None":
  from glmjax import tokenizer as tokenizer_lib  # here, so that in-memory engines need no SentencePiece

  found = folder_lib.read_config(folder)
  tokenizer = tokenizer_lib.Tokenizer.load(paths.named(folder) / folder_lib.TOKENIZER)
  config = placement_lib.inference_config(precision.of(found.model), placement.target)
  texts = reader.Reader(tokenizer, config)
  rows = [config.position_kind.frame(texts.ids(prompt), tokenizer.specials) for prompt in first.prompts]
  blanks = [filling.Filling(row, first.max_tokens, config, tokenizer.specials, frozenset()).blank() for row in rows]
  requests = [lanes_lib.Request(*blank, first.sampling) for blank in blanks if blank is not None]
  groups = source_lib.export_groups(folder, found)
  params = placement.laid_out(config, found.export.get("bits"), offload_layers, groups)
  capacity = first.capacity or scheduler.Capacity(len(requests))
  return _Programs(placement, config, params, tokenizer.specials.pad, requests, capacity) if requests else None


@dataclasses.dataclass(frozen=True)
class _Programs:
  """The programs of a model that is not there yet."""

  placement: placement_lib.Placement
  config: config_lib.GLMConfig  # as inference computes it
  params: Any  # abstract, as `Placement.params` has them
  pad: int
  requests: Sequence[lanes_lib.Request]  # those that get lanes at once, one at least
  capacity: scheduler.Capacity

  @property
  def lanes(self) -> int:
    """Rows of the program that decodes."""
    return self.placement.batch_size(self.capacity.lanes)

  def decoding(self) -> None:
    """Compiles the program that decodes."""
    requests = [*self.requests, *[lanes_lib.FREE] * (self.lanes - len(self.requests))]
    rows, draws, constraints = self._abstract(
      lanes_lib.given(requests, self.config, self.pad, self.capacity.few_programs)
    )
    place, config = self.placement, self.config
    state = place.state(config, self.lanes, self._slots(), lanes_lib.new_tokens(config))
    ids = place.ids_mask(config)
    self._compile(decode.decode, self.params, rows, state, draws, ids, ids, place.number(), constraints)

  def reading(self) -> None:
    """Compiles what reads the first prompt, and gives it a lane."""
    config, new_tokens = self.config, lanes_lib.new_tokens(self.config)
    prompts, rows = self._abstract(
      decode.make_rows([self.requests[0].prompt], [1], self.pad, self.placement.batch_size(1))
    )
    first = rows_lib.bucket(1)
    free = self._compile(lanes_lib.free, self.params, lanes=self.lanes, slots=first, new_tokens=new_tokens)
    x = self._compile(prefill.embed, self.params, prompts)
    layers = [f"{params_lib.LAYERS}_{i}" for i in range(config.num_layers)]
    one = {f"{params_lib.LAYERS}_0": self.params[layers[0]]}
    _, cache = self._compile(prefill.through, one, x, prompts, config=config.one_layer)
    read = self._compile(decode.begin, self.params, dict.fromkeys(layers, cache), rows, new_tokens=new_tokens)
    grown = self._compile(decode.grow, self.params, free, slots=self._slots() - first)
    self._compile(lanes_lib.put, self.params, grown, read, self._abstract(np.int32(0)))

  def _slots(self) -> int:
    """Returns the places of the cache once all requests have joined."""
    return max(
      self.capacity.first_slots(self.config, rows_lib.bucket(len(each.prompt.tokens) - 1), each.limit)
      for each in self.requests
    )

  def _compile(self, program: Callable[..., Any], params: Any, *arguments: Any, **options: Any) -> Any:
    """Compiles program(config, params, *arguments, **options); returns what it will return, abstract."""
    config = options.pop("config", self.config)
    with self.placement.scope():
      compiled = program.trace(config, params, *arguments, **options).lower().compile()
    return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      compiled.out_info,
      compiled.output_shardings,
    )

  def _abstract(self, arguments: Any) -> Any:
    """Returns arrays of the host as `Runner.on_devices` puts them there, abstract."""
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=self.placement.replicated), arguments
    )
