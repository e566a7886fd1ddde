"""A client of benchmarks/serving.py, in a process of its own: streams completions, and times what comes.

Reads a `Load` as JSON from standard input, writes what `Times.told` returns. It speaks HTTP itself, over plain sockets:
a client library would take more of the processors than the server does.
"""

import asyncio
import dataclasses
import json
import random
import sys
import time
from collections.abc import AsyncIterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Load:
  """What is asked, and for how long."""

  port: int
  body: dict[str, Any]  # of every request, besides its prompt
  ids: int  # prompts are random ids below this
  clients: int  # that each ask again as soon as they are answered
  seconds: float  # tokens that come later do not count
  prompt: int = 32  # tokens
  seed: int = 0
  long_prompt: int = 0  # tokens of the prompts that another client sends, one a second; 0: there is none


class Times:
  """When tokens came, all seconds."""

  def __init__(self) -> None:
    """Begins with no time measured."""
    self.first: list[float] = []  # from a request to its first token
    self.next: list[float] = []  # of a stream's further tokens, each its share where several come together
    self.gaps: list[float] = []  # between two arrivals of a stream
    self.tokens = 0.0  # that came in time
    self.all_tokens = 0
    self.answers = self.failures = 0

  def add(self, came: list[float], tokens: int, ends: float) -> None:
    """Takes an answer: when it was asked for, when parts of it came, how many tokens it has; late ones do not count."""
    begun, *parts = came
    in_time = sum(part < ends for part in parts)
    self.answers += 1
    self.all_tokens += tokens
    if not parts:  # ended by its first token, which is no text
      return
    self.tokens += tokens * in_time / len(parts)
    if in_time:
      self.first.append(parts[0] - begun)
    self.gaps += [after - before for before, after in zip(parts, parts[1:]) if before < ends]
    if in_time > 1:
      self.next.append((parts[in_time - 1] - parts[0]) / (in_time - 1) * len(parts) / tokens)

  def told(self, seconds: float) -> dict[str, Any]:
    """Returns figures of a load that took so long."""
    return {
      "tokens_per_second": round(self.tokens / seconds, 1),
      "first_ms": _quantiles(self.first),
      "next_ms": _quantiles(self.next),
      "gap_ms": _quantiles(self.gaps),
      "longest_ms": round(1e3 * max(self.gaps, default=0), 1),
      "answers": self.answers,
      "tokens_an_answer": round(self.all_tokens / max(self.answers, 1), 1),
      "failures": self.failures,
    }


async def main() -> None:
  load = Load(**json.load(sys.stdin))
  times = Times()
  begun, used = time.perf_counter(), time.process_time()
  ends = begun + load.seconds
  askers = [_ask_on(load, random.Random(f"{load.seed} {i}"), ends, times) for i in range(load.clients)]
  if load.long_prompt:
    askers.append(_interrupt(load, random.Random(f"{load.seed} long"), ends))
  await asyncio.gather(*askers)
  used = time.process_time() - used
  json.dump(times.told(load.seconds) | {"cores": round(used / (time.perf_counter() - begun), 3)}, sys.stdout)


def _quantiles(seconds: list[float]) -> dict[str, float]:
  """Returns the median and the 99th percentile, in milliseconds."""
  ordered = sorted(seconds) or [0.0]
  return {name: round(1e3 * ordered[int(share * (len(ordered) - 1))], 2) for name, share in (("50", 0.5), ("99", 0.99))}


async def _ask_on(load: Load, draw: random.Random, ends: float, times: Times) -> None:
  """Asks again and again; the last answer is read to its end."""
  while time.perf_counter() < ends:
    came = [time.perf_counter()]
    tokens = 0
    try:
      async for event in _stream(load, _prompt(load, draw, load.prompt)):
        if (usage := event.get("usage")) is not None:
          tokens = usage["completion_tokens"]
        elif event["choices"][0]["finish_reason"] is None:
          came.append(time.perf_counter())
      times.add(came, tokens, ends)
    except (OSError, EOFError, ValueError) as error:
      times.failures += 1
      print(f"{type(error).__name__}: {error}", file=sys.stderr)
      return


async def _interrupt(load: Load, draw: random.Random, ends: float) -> None:
  """Sends a long prompt once a second, and reads its answer, of which nothing counts."""
  while time.perf_counter() + 1 < ends:
    await asyncio.sleep(1)
    async for _ in _stream(load, _prompt(load, draw, load.long_prompt)):
      pass


def _prompt(load: Load, draw: random.Random, length: int) -> list[int]:
  return [draw.randrange(20, load.ids) for _ in range(length)]


async def _stream(load: Load, prompt: list[int]) -> AsyncIterator[dict[str, Any]]:
  """Yields what a server sends for each token.

  Raises:
    ValueError: for an answer that is none, or tells an error.
  """
  body = json.dumps({"prompt": prompt, "stream": True, "stream_options": {"include_usage": True}, **load.body}).encode()
  head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
  reader, writer = await asyncio.open_connection("127.0.0.1", load.port)
  try:
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    if b" 200 " not in await reader.readline():
      raise ValueError((await reader.read(4000)).decode(errors="replace"))
    while line := await reader.readline():  # headers and sizes of chunks are no events
      if line.startswith(b"data: {"):
        event = json.loads(line[6:])
        if "error" in event:
          raise ValueError(event["error"])
        yield event
  finally:
    writer.close()


if __name__ == "__main__":
  asyncio.run(main())
