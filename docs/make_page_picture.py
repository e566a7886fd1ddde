"""Takes the picture of the server's page, images/page.png: its blanks, filled by a real model.

python docs/make_page_picture.py runs/quickstart/int4
"""

import io
import pathlib
import shutil
import subprocess
import sys

from PIL import Image
from playwright import sync_api

TEXT = "这家酒店的[MASK]不错，[MASK]也很干净，离[MASK]很近。"  # the hotel's _ is good, _ is clean too, it is near _
FILLINGS, SETTINGS = 4, {"Seed": 1, "Temperature": 0.7}
PICTURE = pathlib.Path(__file__).parent / "images" / "page.png"


def main(checkpoint: str) -> None:
  """Serves the model, fills the text's blanks in Chromium, and writes what it shows."""
  command = [sys.executable, "-m", "glmjax", "serve", f"--checkpoint={checkpoint}", "--port=0", "--name=quickstart"]
  server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
  try:
    assert server.stderr is not None
    said = next(line for line in server.stderr if "http://" in line)
    address = next(word for word in said.split() if word.startswith("http://")).rstrip(",")
    with sync_api.sync_playwright() as playwright:
      browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
      page = browser.new_page(locale="en-US", color_scheme="light", viewport={"width": 960, "height": 760})
      page.goto(address)
      page.get_by_role("button", name="Settings").click()
      for name, value in SETTINGS.items():
        page.get_by_label(name).fill(str(value))
      page.get_by_role("button", name="Close").click()
      page.get_by_role("tab", name="Blanks").click()
      page.get_by_label("Text with blanks").fill(TEXT)
      page.locator("#fill-n").fill(str(FILLINGS))
      page.locator("#fill-tokens").fill("12")
      for _ in range(2):  # the first time compiles
        page.get_by_role("button", name="Fill the blanks").click()
        page.get_by_text("tokens read").wait_for()
      shot = page.screenshot()
      browser.close()
  finally:
    server.terminate()
    server.wait()
  with Image.open(io.BytesIO(shot)) as taken:
    taken.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(PICTURE, optimize=True)
  print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
  main(sys.argv[1])
