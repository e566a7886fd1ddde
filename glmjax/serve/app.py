"""The server's routes: OpenAI's, blanks to fill, tokens, health and figures, and the page."""

import asyncio
import base64
import dataclasses
import hashlib
import importlib.resources
import json
import re
import secrets
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

import fastapi
import fastapi.exceptions
import fastapi.responses
import starlette.exceptions

from glmjax import errors
from glmjax.infer import engine as engine_lib
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import reader
from glmjax.infer import scheduler as scheduler_lib
from glmjax.serve import answers as answers_lib
from glmjax.serve import limits
from glmjax.serve import log
from glmjax.serve import metrics as metrics_lib
from glmjax.serve import prompts as prompts_lib
from glmjax.serve import replies
from glmjax.serve import service as service_lib
from glmjax.serve import wire


_MOST_TOLD = 1 << 19  # log-probabilities of prompts in a reply


def check_names(model: str, adapters: Collection[str]) -> None:
  """Raises InputError where an adapter has the model's name."""
  if model in adapters:
    raise errors.InputError(f"an adapter and the model are both called {model!r}: give one of them another name")


class TooLong(Exception):
  """A prompt that leaves too little of the model's length to its answer."""


class Server:
  """What the routes need: the model and its name, the service, whose keys are taken."""

  def __init__(
    self,
    engine: engine_lib.Engine,
    name: str,
    capacity: scheduler_lib.Capacity,
    most_waiting: int = 256,
    keys: Sequence[str] = (),
  ) -> None:
    """Makes a server of one model.

    Args:
      engine: the model.
      name: what requests call it.
      capacity: how much is answered at the same time.
      most_waiting: answers that wait at most, beside those.
      keys: without one of them nobody is answered, unless there are none.

    Raises:
      errors.InputError: where an adapter has the model's name.
    """
    check_names(name, engine.adapters)
    self.engine, self.name, self.keys = engine, name, [key.encode() for key in keys]
    self.metrics = metrics_lib.Metrics()
    self.answers = answers_lib.Answers(self.metrics)
    self.service = service_lib.Service(engine, capacity, most_waiting, self.answers.deliver)
    self.ready = False  # whether the programs are compiled, and requests are taken

  def begin(self) -> None:
    """Starts the service, in the running event loop."""
    self.answers.begin(self.service)
    self.service.start()

  def key_of(self, request: fastapi.Request) -> str:
    """Returns whose request it is: a key's (which limits.Keys has found to be one), or an address's."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    return hashlib.sha256(given).hexdigest() if self.keys else request.client.host if request.client else ""

  @property
  def names(self) -> list[str]:
    """What requests call the model, alone and with each of its adapters."""
    return [self.name, *self.engine.adapters]

  def adapter_of(self, model: str | None) -> str | None:
    """Returns the adapter that a request's model names; raises HTTPException for a model that there is not."""
    if model is None or model == self.name:
      return None
    if model not in self.engine.adapters:
      there = f"it is {self.name!r}" if len(self.names) == 1 else f"there are {', '.join(map(repr, self.names))}"
      raise fastapi.HTTPException(404, f"there is no model {model[:100]!r} here: {there}")
    return model

  def check_room(self, row: Sequence[int], least: int) -> None:
    """Raises TooLong unless a prompt leaves so many tokens to its answer, and InputError for what are no ids."""
    prompt_lib.check_ids(row, self.engine.config.vocab_size)
    length = self.engine.config.max_length
    if length - len(row) - 1 < least:
      raise TooLong(
        f"the prompt takes {len(row) + 1} tokens, and of the model's {length} it must leave {least} to the answer"
      )

  async def read(self, text: str, literal: bool) -> list[int]:
    """Returns a prompt's tokens as Engine.encode does, while the event loop goes on: a text may be long."""
    return await asyncio.to_thread(self.engine.encode, text, literal)

  def jobs(self, request: wire.Request, rows: Sequence[Sequence[int]], **more: Any) -> list[service_lib.Job]:
    """Returns the jobs of a request: `n` of each row, each with a seed of its own."""
    seed = secrets.randbits(31) if request.seed is None else request.seed
    how = request.sampling()
    copies = [row for row in rows for _ in range(request.n)]
    return [service_lib.Job(row, sampling=how, seed=seed + i, **more) for i, row in enumerate(copies)]

  async def answer(
    self,
    request: fastapi.Request,
    jobs: Sequence[service_lib.Job],
    reply: replies.Reply,
    options: wire.Streaming | None,
  ) -> fastapi.Response:
    """Answers with a stream, where the request's options ask for it, or when all jobs have ended."""
    asked = self.answers.ask(jobs)
    request.state.reply = reply
    self.metrics.prompt_tokens.inc(reply.usage()["prompt_tokens"])
    if options is not None and options.stream:
      tells = options.stream_options is not None and options.stream_options.include_usage
      return _EventStream(asked, reply, tells)
    try:
      return await _unless_gone(request, _whole(asked, reply))
    finally:
      asked.close()


class _EventStream(fastapi.responses.StreamingResponse):
  """Server-sent events of some jobs, which end with it, however it ends."""

  def __init__(self, asked: answers_lib.Asked, reply: replies.Reply, tells: bool) -> None:
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    super().__init__(_events(asked, reply, tells), media_type="text/event-stream", headers=headers)
    self._asked = asked

  async def __call__(self, *arguments: Any) -> None:
    try:
      await super().__call__(*arguments)
    finally:
      self._asked.close()


async def _events(asked: answers_lib.Asked, reply: replies.Reply, tells: bool) -> AsyncIterator[str]:
  async for i, event in asked.events():
    if isinstance(event, service_lib.End) and event.error is not None:
      yield _event(_error(str(event.error), "server_error"))
      return
    yield _event(reply.add(i, event))
  if tells:
    yield _event(reply.last())
  yield "data: [DONE]\n\n"


def _event(content: replies.Json) -> str:
  return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _whole(asked: answers_lib.Asked, reply: replies.Reply) -> fastapi.Response:
  async for i, event in asked.events():
    if isinstance(event, service_lib.End) and event.error is not None:
      return fastapi.responses.JSONResponse(_error(str(event.error), "server_error"), 500)
    reply.add(i, event)
  return fastapi.responses.JSONResponse(reply.whole())


async def _unless_gone(request: fastapi.Request, work: Any) -> fastapi.Response:
  """Awaits work as long as the client is there."""
  work = asyncio.ensure_future(work)
  gone = asyncio.ensure_future(_gone(request))
  try:
    await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
    return work.result() if work.done() else fastapi.Response(status_code=499)  # nobody reads it
  finally:
    for task in (work, gone):
      task.cancel()


async def _gone(request: fastapi.Request) -> None:
  while (await request.receive())["type"] != "http.disconnect":
    pass


def _error(message: str, kind: str, param: str | None = None, code: str | None = None) -> replies.Json:
  return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def create(server: Server, limit: limits.Limits = limits.Limits(), log_prompts: bool = False) -> fastapi.FastAPI:
  """Returns the application; `log_prompts`: what is asked is in the log."""
  told: Any = {"default": {"description": "What is wrong, as OpenAI tells it.", "model": wire.Failed}}
  app = fastapi.FastAPI(title="glmjax", version="1", docs_url=None, redoc_url=None, responses=told)
  app.add_middleware(limits.Bodies, limits=limit)
  app.add_middleware(limits.Keys, keys=server.keys)
  app.add_middleware(log.Requests, prompts=log_prompts)
  _add_errors(app)
  _add_answers(app, server)
  _add_tokens(app, server)
  _add_health(app, server)
  return app


def _add_errors(app: fastapi.FastAPI) -> None:
  """Has every error told as OpenAI tells it."""

  def tell(
    status: int, message: str, param: str | None = None, code: str | None = None, retry: bool = False
  ) -> fastapi.Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"Retry-After": "1"} if retry else None
    return fastapi.responses.JSONResponse(_error(message, kind, param, code), status, headers)

  @app.exception_handler(fastapi.exceptions.RequestValidationError)
  async def invalid(_: fastapi.Request, error: fastapi.exceptions.RequestValidationError) -> fastapi.Response:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return tell(400, f"{place}: {first['msg']}"[:500] if place else first["msg"][:500], place[:100] or None)

  @app.exception_handler(starlette.exceptions.HTTPException)
  async def refused(_: fastapi.Request, error: starlette.exceptions.HTTPException) -> fastapi.Response:
    return tell(error.status_code, str(error.detail))

  @app.exception_handler(errors.InputError)
  async def mistaken(_: fastapi.Request, error: errors.InputError) -> fastapi.Response:
    return tell(400, str(error))

  @app.exception_handler(TooLong)
  async def too_long(_: fastapi.Request, error: TooLong) -> fastapi.Response:
    return tell(400, str(error), code="context_length_exceeded")

  @app.exception_handler(service_lib.Refused)
  async def busy(_: fastapi.Request, error: service_lib.Refused) -> fastapi.Response:
    return tell(503, str(error), retry=True)

  @app.exception_handler(Exception)
  async def failed(_: fastapi.Request, error: Exception) -> fastapi.Response:
    return tell(500, f"the server failed ({type(error).__name__})")


def _add_answers(app: fastapi.FastAPI, server: Server) -> None:
  """Adds the routes that the model answers."""
  engine = server.engine

  streamed: Any = {200: {"content": {"text/event-stream": {}}}}

  @app.post("/v1/chat/completions", responses=streamed)
  async def chat(body: wire.Chat, request: fastapi.Request) -> fastapi.Response:
    key = server.key_of(request)
    adapter = server.adapter_of(body.model)
    row = await server.read(prompts_lib.conversation(body.messages), literal=True)
    quarter = engine.config.max_length // 4  # what chats leave to an answer at least
    most = body.max_completion_tokens or body.max_tokens or engine.config.max_length
    server.check_room(row, min(most, quarter))
    tops = body.top_logprobs if body.logprobs else None
    more = {"max_tokens": most, "logprobs": tops, "stops": body.stops(), "clean": True}
    jobs = server.jobs(body, [row], **more, adapter=adapter, key=key)
    return await server.answer(
      request, jobs, replies.ChatReply(engine, body.model or server.name, len(jobs), len(row)), body
    )

  @app.post("/v1/completions", responses=streamed)
  async def complete(body: wire.Completion, request: fastapi.Request) -> fastapi.Response:
    key = server.key_of(request)
    adapter = server.adapter_of(body.model)
    if not body.max_tokens and not body.echo:
      raise errors.InputError("max_tokens is 0: give 1 or more, or echo, which answers with the prompt")
    server.answers.check_count(body.count * body.n)
    prompts = await asyncio.to_thread(prompts_lib.read, engine, body.prompt)
    for prompt in prompts:
      server.check_room(prompt.row, min(body.max_tokens, 1))
    more = {"max_tokens": body.max_tokens, "logprobs": body.logprobs, "stops": body.stops()}
    jobs = server.jobs(body, [prompt.row for prompt in prompts], **more, adapter=adapter, key=key)
    copies = [prompt for prompt in prompts for _ in range(body.n)]
    if body.echo and body.logprobs is not None:
      _check_told(sum(len(copy.content) for copy in copies), body.logprobs)
      jobs = [dataclasses.replace(job, scored=copy.content) for job, copy in zip(jobs, copies)]
    shown = [(copy.text, copy.tokens) for copy in copies]
    count = sum(len(prompt.tokens) for prompt in prompts)
    return await server.answer(
      request, jobs, replies.CompletionReply(engine, body.model or server.name, shown, count, body.echo), body
    )

  @app.post("/v1/fill")
  async def fill(body: wire.Fill, request: fastapi.Request) -> fastapi.Response:
    key = server.key_of(request)
    adapter = server.adapter_of(body.model)
    if not reader.MASKS.search(body.text):
      raise errors.InputError("text: there is no blank in it: write [MASK] where one is")
    row = await server.read(body.text, literal=False)
    server.check_room(row, 1)
    jobs = server.jobs(body, [row], max_tokens=body.max_tokens, adapter=adapter, key=key)
    return await server.answer(
      request, jobs, replies.FillReply(engine, body.model or server.name, len(jobs), len(row)), None
    )


def _check_told(tokens: int, tops: int) -> None:
  """Raises InputError for more log-probabilities of prompts than are told at once."""
  if (told := tokens * (1 + tops)) > _MOST_TOLD:
    raise errors.InputError(
      f"echo with logprobs: {told} log-probabilities of prompts are asked for at once, and {_MOST_TOLD} are told: ask "
      "for fewer prompts, answers or logprobs"
    )


def _add_tokens(app: fastapi.FastAPI, server: Server) -> None:
  """Adds what a client asks of the tokenizer, and which model there is."""
  tokenizer, config = server.engine.tokenizer, server.engine.config
  specials = tokenizer.specials

  named = {"bos_token": specials.sop, "eos_token": specials.eop, "mask_token": specials.mask}
  names = {key: tokenizer.decode_bytes([token], show_special=True).decode() for key, token in named.items()}
  ids = {names[key]: [token] for key, token in named.items()}  # clients ask for them by /tokenize

  def of_model(name: str) -> replies.Json:
    told = {"id": name, "object": "model", "created": 0, "owned_by": "glmjax", "max_model_len": config.max_length}
    return told if name == server.name else told | {"parent": server.name}

  @app.get("/v1/models")
  async def models() -> replies.Json:
    return {"object": "list", "data": [of_model(name) for name in server.names]}

  @app.get("/v1/models/{name:path}")
  async def one_model(name: str) -> replies.Json:
    server.adapter_of(name)
    return of_model(name)

  @app.get("/tokenizer_info")
  @app.get("/v1/tokenizer_info", include_in_schema=False)
  async def tokenizer_info() -> replies.Json:
    return {"tokenizer_class": "glmjax", **names, "vocab_size": tokenizer.vocab_size}

  @app.post("/tokenize")
  @app.post("/v1/tokenize", include_in_schema=False)
  async def tokenize(body: wire.Tokenize) -> replies.Json:
    server.adapter_of(body.model)
    if body.add_special_tokens:
      tokens = await server.read(body.prompt, literal=False)
    else:
      tokens = ids.get(body.prompt) or await asyncio.to_thread(tokenizer.encode, body.prompt)
    return {"tokens": tokens, "count": len(tokens), "max_model_len": config.max_length}

  @app.post("/detokenize")
  @app.post("/v1/detokenize", include_in_schema=False)
  async def detokenize(body: wire.Detokenize) -> replies.Json:
    server.adapter_of(body.model)
    return {"prompt": tokenizer.decode(body.tokens)}


def _add_health(app: fastapi.FastAPI, server: Server) -> None:
  """Adds what watches over the server, and the page."""

  @app.get("/health")
  async def health() -> replies.Json:
    return {"status": "ok"}

  @app.get("/ready")
  async def ready() -> fastapi.Response:
    return fastapi.responses.JSONResponse({"ready": server.ready}, 200 if server.ready else 503)

  @app.get("/metrics", include_in_schema=False)
  async def metrics() -> fastapi.Response:
    return fastapi.Response(server.metrics.text(server.service), media_type="text/plain; version=0.0.4")

  content = (importlib.resources.files("glmjax.serve") / "page.html").read_text(encoding="utf-8")
  headers = {
    "Content-Security-Policy": _policy(content),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
  }

  @app.get("/", include_in_schema=False)
  async def root() -> fastapi.Response:
    return fastapi.responses.HTMLResponse(content, headers=headers)


def _policy(page: str) -> str:
  """Returns what a browser may do for a page: run and apply what is in it, and ask this server, nothing else."""

  def hashes(tag: str) -> str:
    parts = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page, re.DOTALL)
    found = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
    return " ".join(f"'sha256-{each}'" for each in found) or "'none'"

  return (
    f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
  )
