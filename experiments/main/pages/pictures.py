"""Pictures of every kind of page, of made-up runs, 1440 and 390 pixels wide.

python experiments/main/pages/pictures.py [KIND]...      (needs chromium and chromedriver)

The runs are those of tests/page_kinds.py. Writes KIND-WIDTH-light.png or -dark.png beside this
file: 2,200 pixels of the page from its top, or from the section of a search or an anatomy.
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "tests"))
from page_in_browser import BROWSER, DRIVER, scheme, size, start  # noqa: E402 - from tests/
from page_kinds import KINDS, Pages, show  # noqa: E402 - from tests/

NAMES = {  # kind -> name of its pictures
    "warm_up": "sweep-warmup", "one": "one-run", "failed": "all-failed", "sixty": "sixty-rows",
    "running": "running", "searched": "search", "anatomised": "anatomy",
}  # fmt: skip
LOOKS = ((1440, "light"), (390, "dark"))
TALLEST = 2200  # pixels
SECTIONS = {"searched": "search", "anatomised": "anatomy"}  # kind -> where its picture begins


def main(arguments: list[str]) -> int:
    """Draw the kinds that are named, by default all; returns the exit status."""
    unknown = sorted(set(arguments) - set(NAMES))
    if unknown or not (BROWSER and DRIVER):
        said = f"no kind {unknown[0]}; there are {', '.join(NAMES)}" if unknown else "no chromium"
        print(f"error: {said}", file=sys.stderr)
        return 2
    browser = start()
    with tempfile.TemporaryDirectory() as base:
        pages = Pages(Path(base))
        for kind in arguments or NAMES:
            assert kind in KINDS
            for width, look in LOOKS:
                show(browser, pages[kind], width)
                scheme(browser, look)
                path = HERE / f"{NAMES[kind]}-{width}-{look}.png"
                path.write_bytes(picture(browser, width, SECTIONS.get(kind, "")))
                size(browser, width)
                print(path)
    browser.quit()
    return 0


def picture(browser: webdriver.Chrome, width: int, section: str) -> bytes:
    """The page from its top or from the section with this id, as PNG."""
    browser.execute_script("scrollTo(0, 0)")
    height = browser.execute_script("return document.documentElement.scrollHeight")
    asked_for = "return document.getElementById(arguments[0])?.getBoundingClientRect().top ?? 0"
    top = max(0, browser.execute_script(asked_for, section))
    tall = min(height - top, TALLEST)
    clip = {"x": 0, "y": top, "width": width, "height": tall, "scale": 1}
    asked = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    taken = base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", asked)["data"])
    small = io.BytesIO()  # 256 colours, in a quarter of the bytes
    Image.open(io.BytesIO(taken)).convert("RGB").quantize(256).save(small, "png", optimize=True)
    return small.getvalue()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
