"""A page in headless Chromium: its size and scheme, waiting, and the columns of its table."""

import shutil
import time

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")


def start():
    """Headless Chromium, which keeps what its console says and what it asks for."""
    options = Options()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(DRIVER))


def size(browser, width):
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def scheme(browser, name):
    features = [{"name": "prefers-color-scheme", "value": name}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "the page is not what it should be"
        time.sleep(0.05)
    return found


def column(browser, name):
    headings = [th.text for th in browser.find_elements(By.CSS_SELECTOR, "#results thead th")]
    at = [heading.split(" ▲")[0].split(" ▼")[0] for heading in headings].index(name)
    rows = browser.find_elements(By.CSS_SELECTOR, "#results tbody tr:not([hidden])")
    return [row.find_elements(By.TAG_NAME, "td")[at].text for row in rows]
