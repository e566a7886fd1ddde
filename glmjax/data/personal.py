"""Personal data in text, found by its form: addresses of e-mail and IP, telephones, Chinese identity numbers, cards.

What has a checksum must fit it, which nine of ten other numbers do not. Forms are all that is looked at: names and
postal addresses are not found, and a version like 1.2.3.4 is taken for an address.
"""

from collections.abc import Callable, Collection, Iterator
import datetime
import re
import typing

EMAIL, PHONE_CN, PHONE_US, ID_CN, IP, CARD = KINDS = ("email", "phone_cn", "phone_us", "id_cn", "ip", "card")

# Every repetition is bounded and begins where no other does, so that a line of 10 MB takes no longer a character.
_EMAIL = re.compile(
  r"(?<![\w.%+-])[A-Za-z0-9][\w.%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])", re.ASCII
)
_NUMBERS = re.compile(r"(?<![\w.+-])[+(]{0,2}[0-9][0-9() .-]{5,1000}[0-9Xx](?!\w)", re.ASCII)  # may hold those below
_ID_CN = re.compile(r"(?<![0-9])[1-9][0-9]{5}(?:19|20)[0-9]{9}[0-9Xx](?![0-9])")  # GB 11643-1999
_IP = re.compile(r"(?<![0-9.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9]|\.[0-9])")
_CARD = re.compile(r"(?<![0-9])[2-6][0-9]{3}(?:[ -]?[0-9]{4}){2,3}[ -]?[0-9]{1,4}(?![0-9])")  # ISO/IEC 7812: 13 to 19
_MOBILE_CN = r"(?:\+?86[ -]?)?1[3-9][0-9](?:[ -]?[0-9]{4}){2}"  # 1 and ten digits
_CITY_CN = r"(?:\+?86[ -]?|\(?0)[1-9][0-9]{1,2}\)?[ -][2-9][0-9]{6,7}"  # 0, the city's code, and 7 or 8 digits
_PHONE_CN = re.compile(rf"(?<![0-9])(?:{_MOBILE_CN}|{_CITY_CN})(?![0-9])")
_PHONE_US = re.compile(  # North American Numbering Plan, with something between its parts
  r"(?<![0-9])(?:\+?1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[ .-])[2-9][0-9]{2}[ .-][0-9]{4}(?![0-9])"
)
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # GB 11643-1999
_ID_CHECKS = "10X98765432"


class Found(typing.NamedTuple):
  """One place of a text, [start, stop)."""

  kind: str
  start: int
  stop: int


def find(text: str) -> list[Found]:
  """Returns the places of personal data in their order; no two have a character in common."""
  found = [Found(EMAIL, *match.span()) for match in _EMAIL.finditer(text)] if "@" in text else []
  for match in _NUMBERS.finditer(text):
    found += _numbers(text, *match.span())
  places = []
  for each in sorted(found, key=lambda each: each.start):
    if not places or each.start >= places[-1].stop:
      places.append(each)
  return places


def masked(text: str, kinds: Collection[str] = KINDS) -> str:
  """Returns the text with <email>, <card> and so on in the place of what was found of some kinds."""
  pieces, done = [], 0
  for found in find(text):
    if found.kind in kinds:
      pieces += [text[done : found.start], f"<{found.kind}>"]
      done = found.stop
  return "".join([*pieces, text[done:]])


def outline(text: str) -> str:
  """Returns a text as a form: every letter and digit as *; of what was found, say, to show without telling it."""
  return re.sub(r"\w", "*", text)


def _numbers(text: str, start: int, stop: int) -> Iterator[Found]:
  """Yields what a run of digits holds: of forms that overlap the one that is checked most."""
  taken = bytearray(stop - start)
  for kind, pattern, fits in _FORMS:
    for match in pattern.finditer(text, start, stop):
      first, behind = match.span()
      if fits(match[0]) and not any(taken[first - start : behind - start]):
        taken[first - start : behind - start] = b"\1" * (behind - first)
        yield Found(kind, first, behind)


def _is_id(number: str) -> bool:
  """Tells whether a Chinese identity number has a day of birth and the right check digit."""
  try:
    datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
  except ValueError:
    return False
  total = sum(weight * int(digit) for weight, digit in zip(_ID_WEIGHTS, number))
  return number[17].upper() == _ID_CHECKS[total % 11]


def _is_card(number: str) -> bool:
  """Tells whether the digits fit Luhn's checksum (ISO/IEC 7812-1), and are not all the same."""
  digits = [int(digit) for digit in number if digit.isdigit()]
  doubled = [digit if i % 2 == 0 else 2 * digit - 9 * (digit > 4) for i, digit in enumerate(reversed(digits))]
  return 13 <= len(digits) <= 19 and len({*digits}) > 1 and sum(doubled) % 10 == 0


def _is_ip(number: str) -> bool:
  """Tells whether the four parts are bytes, and no address that names this machine or none."""
  parts = [int(part) for part in number.split(".")]
  return max(parts) < 256 and parts[0] not in (0, 127) and all(str(int(part)) == part for part in number.split("."))


def _always(_: str) -> bool:
  return True


_FORMS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
  (ID_CN, _ID_CN, _is_id),
  (CARD, _CARD, _is_card),
  (IP, _IP, _is_ip),
  (PHONE_CN, _PHONE_CN, _always),
  (PHONE_US, _PHONE_US, _always),
)
