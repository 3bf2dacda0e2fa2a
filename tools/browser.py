"""A Chromium for the tests: one that is there, else Playwright's own, else the system's package manager's.
  python tools/browser.py     print the path, installing what is missing"""
import os, shutil, subprocess, sys
from functools import lru_cache

from playwright.sync_api import Error, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync"]


def launch(playwright, path=None):
    "A headless Chromium."
    return playwright.chromium.launch(executable_path=path, args=ARGS)

def works(path):
    "Does this Chromium start? Returns '' or the reason why not."
    if not path: return "none there"
    try:
        with sync_playwright() as p: launch(p, path).close()
    except Error as e: return str(e).strip().splitlines()[0]
    return ""

def sources():
    "Where a Chromium may come from, the cheapest first: (what is tried, command to run before, where it then lies)."
    def named(): return next(filter(None, map(shutil.which, NAMES)), None)
    def own():
        with sync_playwright() as p: return p.chromium.executable_path if os.path.exists(p.chromium.executable_path) else None
    root, playwright = os.name == "posix" and os.getuid() == 0, [sys.executable, "-m", "playwright"]
    yield "on the PATH", None, named
    yield "Playwright's", None, own
    yield "playwright install", [*playwright, "install", "chromium"], own
    if root and shutil.which("apt-get"):
        if own(): yield "playwright install-deps", [*playwright, "install-deps", "chromium"], own
        yield "apt-get install", ["sh", "-c", "apt-get update -qq && apt-get install -y -qq chromium"], named

@lru_cache
def chromium():
    "Path of a Chromium that starts; raises RuntimeError naming everything that was tried."
    tried = []
    for what, command, find in sources():
        if command and (r := subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)).returncode:
            tried.append(f"{what}: {(r.stderr or r.stdout).strip().splitlines()[-1:]}")
            continue
        if not (why := works(path := find())): return path
        tried.append(f"{what}: {why}")
    raise RuntimeError("no Chromium could be started: " + "; ".join(tried))

if __name__ == "__main__": print(chromium())
