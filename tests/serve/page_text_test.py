"""What the chat page makes of text: hostile, marked, long, copied."""

import re
import time

import pytest
from serve import page_steps

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("is_secure", [True, False])
def test_copying(opened, fake, is_secure):
  """By the clipboard's own functions, and without them, as pages from another machine over plain http are."""
  page = opened(permissions=["clipboard-read", "clipboard-write"])
  if not is_secure:
    page.add_init_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.reload()
  fake.pieces = ["Run **this**:\n```sh\nls  -l\n\necho 中文\n```\n"]
  page_steps.ask(page, "how?")
  page.get_by_role("button", name="Another answer").wait_for()
  copying = page.get_by_role("button", name="Copy")
  for place, text in ((0, "how?"), (1, "ls  -l\n\necho 中文"), (2, fake.pieces[0])):
    copying.nth(place).click()
    page.get_by_text("Copied").first.wait_for()
    page.get_by_label("Your question").fill("")
    page.get_by_label("Your question").press("Control+v")
    assert page.get_by_label("Your question").input_value() == text
    page.get_by_role("button", name="Copied").wait_for(state="detached")


HOSTILE = """<img src=x onerror="window.hacked=1"> <script>window.hacked=1</script> </script><svg onload=hacked=1>
[a](javascript:window.hacked=1) [b](JaVaScRiPt:hacked=1) [c](data:text/html,x) [d](//evil.example/x) [e](x"onclick=1)
[`f`](https://example.org/?q="><img>) **<b onclick=1>** `<i>` <https://example.org/y>

| <img src=x> | b |
|---|---|
| <script>x</script> | [g](vbscript:x) |

```"><img src=x>
</code></pre><img src=x onerror=hacked=1>
```
# <iframe src=x>
- <a href="javascript:hacked=1">h</a>
\u202eright to left\u202c &lt;b&gt; \x00\x07 {{x}} ${x}
"""


def test_hostile_text_stays_text(opened, fake):
  page = opened()
  long = "x" * 20_000 + "*_`[(" * 1000 + "|" * 3000
  fake.pieces = [*(HOSTILE[i : i + 11] for i in range(0, len(HOSTILE), 11)), "\n", long]
  page_steps.ask(page, HOSTILE + long)
  page.get_by_role("button", name="Another answer").wait_for()
  for _ in range(2):
    log = page.locator("#log")
    assert log.locator("img, script, svg, iframe, i, b").count() == 0
    addresses = log.locator("a").evaluate_all("(links) => links.map((link) => [link.protocol, link.rel, link.target])")
    assert len(addresses) == 2 and all(each == ["https:", "noopener noreferrer", "_blank"] for each in addresses)
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert log.evaluate("(log) => log.scrollWidth <= log.clientWidth")
    page.reload()  # from the store


MARKDOWN = """# One *two*
Text with **bold *both* x**, __bars__, snake_case_name, 2 * 3 * 4, `a*b*c` and \\*stars\\*.
Second line
1. first
   goes on

2. second
   - deeper
     - deepest
   - again
   ```py
   if x:
     y
   ```
3. third
* other
> quote
> goes on
***
a | b
--|--
`1` | 2 \\| 3

not a table | here
~~~
```
unclosed
"""


def test_markdown_is_the_same_in_a_stream_and_at_once(opened, fake):
  page = opened()
  fake.pieces, fake.seconds = list(MARKDOWN), 0.01
  page_steps.ask(page, "x")
  page.get_by_role("button", name="Another answer").wait_for()
  streamed = page.locator(".message.assistant .text").inner_html()
  page.reload()
  page.get_by_role("button", name="Another answer").wait_for()
  assert page.locator(".message.assistant .text").inner_html() == streamed
  plain = re.sub(r' (class|type|tabindex|data-word|start)="[^"]*"', "", streamed)
  for part in (
    "<h1>One <em>two</em></h1>",
    "<strong>bold <em>both</em> x</strong>",
    "<strong>bars</strong>, snake_case_name, 2 * 3 * 4, <code>a*b*c</code> and *stars*.<br>Second line</p>",
    "<ol><li>first<br>goes on</li><li>second<ul><li>deeper<ul><li>deepest</li></ul></li><li>again<div>",
    "<pre><code><span>if x:\n  y\n</span></code></pre></div></li></ul></li><li>third</li></ol><ul><li>other</li></ul>",
    "<blockquote>quote<br>goes on</blockquote><hr>",
    "<tr><th>a</th><th>b</th></tr><tr><td><code>1</code></td><td>2 | 3</td></tr>",
    "<p>not a table | here</p>",
    "<span>```\nunclosed\n</span>",
  ):
    assert part in plain, (part, plain)


@pytest.mark.parametrize("kind", ["lines", "code", "one line", "marks"])
def test_a_long_answer_leaves_the_page_responsive(opened, fake, kind):
  """10,000 lines: the longest time in which the page does nothing else is counted by a timer of its own."""
  page = opened()
  lines = [f"{i} **some** words of a line, `code` and 中文\n" for i in range(10_000)]
  if kind == "one line":
    lines = [line.strip() + " " for line in lines[:3000]]
  if kind == "marks":  # that open and never close
    lines = ["**a *b __c _d `e [f](g https://h." + "." * 200] * 3000
  fake.pieces = ["```\n" if kind == "code" else "", *lines, "\nfinis"]
  fake.seconds = 1e-4
  page.evaluate("""() => {
    window.longest = 0;
    let last = performance.now();
    setInterval(() => {
      longest = Math.max(longest, performance.now() - last);
      last = performance.now();
    }, 10);
  }""")
  page_steps.ask(page, "go on")
  page.get_by_text("finis").wait_for(timeout=120_000)
  page.get_by_role("button", name="Another answer").wait_for(timeout=120_000)
  assert page.evaluate("longest") < 5000  # some 400 where two processors are full
  began = time.monotonic()
  page.get_by_role("tab", name="Blanks").click()
  page.get_by_role("tab", name="Chat").click()
  assert time.monotonic() - began < 10
