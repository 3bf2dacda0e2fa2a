"""JupyterLab as `make lab` starts it, in a real headless Chromium: the tour opens, Run All ends without errors, sliders change pictures."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from tools.browser import chromium, launch

ROOT = Path(__file__).resolve().parent.parent
SCREENS = Path(os.environ.get("SCREENS", ROOT/"_out/screens"))
LIMIT = 300  # seconds for Run All at smoke budget
PICTURES = """root => Promise.all([...root.querySelectorAll("img")].map(async i => {
    const bytes = new Uint8Array(await (await fetch(i.src)).arrayBuffer());
    return bytes.length + ":" + bytes.reduce((a, b) => (a * 31 + b) >>> 0, 7) }))"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def get(url, token=None):
    "Status and body of a GET."
    request = urllib.request.Request(url, headers={"Authorization": f"token {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as r: return r.status, r.read()
    except urllib.error.HTTPError as e: return e.code, b""
    except OSError: return None, b""


class Lab:
    "`make lab` on a copy of the notebooks, with settings of its own; the token is read from what it prints."
    def __init__(self, home):
        self.home, self.port = home, free_port()
        shutil.copytree(ROOT/"nbs", home/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        shutil.copytree(ROOT/"data", home/"data")
        settings = home/"settings/@jupyterlab"
        for plugin, values in {"notebook-extension/tracker": {"windowingMode": "none"}, "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}.items():
            (settings/plugin).parent.mkdir(parents=True, exist_ok=True)
            (settings/f"{plugin}.jupyterlab-settings").write_text(json.dumps(values))
        env = {**os.environ, "PYTHONPATH": str(ROOT), "VFM_LAB_BUDGET": "smoke", "OMP_NUM_THREADS": "2", "JUPYTER_CONFIG_DIR": str(home/"config"),
               "JUPYTERLAB_SETTINGS_DIR": str(home/"settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home/"workspaces"), "JUPYTER_RUNTIME_DIR": str(home/"runtime")}
        env = {k: v for k, v in env.items() if k != "MPLBACKEND" and not k.startswith("COVERAGE")}   # as in a reader's shell
        self.log = open(home/"lab.log", "w")
        flags = f"--no-browser --port={self.port} --ServerApp.port_retries=0 --ServerApp.root_dir={home}"
        start = time.time()   # -o: whatever is installed is what is tested
        self.process = subprocess.Popen(["make", "-o", f"{os.environ.get('VENV', '.venv')}/bin/.installed", "lab", f"LAB_FLAGS={flags}"], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=self.log,
                                        stderr=subprocess.STDOUT, start_new_session=True)
        self.url = f"http://127.0.0.1:{self.port}"
        while get(f"{self.url}/api")[0] != 200:
            assert self.process.poll() is None and time.time() - start < 60, f"make lab did not come up:\n{self.text()[-3000:]}"
            time.sleep(.05)
        self.seconds = time.time() - start
        while not re.search(r"token=(\w+)", self.text()): time.sleep(.05)
        self.token = re.search(r"token=(\w+)", self.text())[1]

    def text(self): return (self.home/"lab.log").read_text()
    def kernels(self): return json.loads(get(f"{self.url}/api/kernels", self.token)[1])

    def close(self):
        for s in (signal.SIGTERM, signal.SIGKILL):
            try: os.killpg(self.process.pid, s)
            except ProcessLookupError: break
            try: self.process.wait(15)
            except subprocess.TimeoutExpired: continue
        self.log.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    if lab.seconds > 5:   # the first call of all reads JupyterLab from a cold disk
        lab.close()
        lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()

@pytest.fixture(scope="module")
def page(lab):
    "The tour, opened by the address that `make lab` prints."
    path = chromium()
    with sync_playwright() as p:
        browser = launch(p, path)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(re.search(r"http://127\.0\.0\.1:\S+token=\w+", lab.text())[0])
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
        yield page
        browser.close()

def shoot(page, name):
    SCREENS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENS/f"{name}.png")


def test_lab_is_quick_local_and_closed(lab):
    "A second `make lab` answers in under 5 s, on 127.0.0.1 only, and wants its token."
    print(f"make lab answered after {lab.seconds:.1f} s")
    assert lab.seconds < 5, f"{lab.seconds:.1f} s"
    assert get(f"{lab.url}/api/contents")[0] == 403 and get(f"{lab.url}/api/contents", lab.token)[0] == 200
    addresses = {a[4][0] for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in addresses:
        with socket.socket() as s:
            s.settimeout(2)
            assert s.connect_ex((address, lab.port)) != 0, f"JupyterLab listens on {address}"

def test_run_all(lab, page):
    "Run > Run All Cells, through the menu, ends with every cell run and no error."
    path = lab.home/"nbs/tour.ipynb"
    page.get_by_text(re.compile(r"\(ipykernel\) \| Idle")).wait_for(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    start, cells, errors = time.time(), [], []
    while time.time() - start < LIMIT and not errors:
        time.sleep(1)
        if lab.kernels()[0]["execution_state"] != "idle": continue
        page.keyboard.press("Control+s")
        time.sleep(1)
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
        errors = [f"code cell {i}: {o['ename']}: {o['evalue']}" for i, c in enumerate(cells) for o in c["outputs"] if o["output_type"] == "error"]
        if all(c["execution_count"] for c in cells) and lab.kernels()[0]["execution_state"] == "idle": break
    shoot(page, "tour")
    assert not errors, errors
    waiting = [i for i, c in enumerate(cells) if not c["execution_count"]]
    assert cells and not waiting, f"code cells {waiting} of {len(cells)} were not run in {LIMIT} s"

def test_slider_changes_picture(page):
    "Every slider answers the keyboard; at least one of them changes the pixels of a picture in its cell."
    sliders = page.locator(".jp-Cell .widget-slider .noUi-handle")
    assert sliders.count(), "the tour shows no slider"
    changed = []
    for i in range(sliders.count()):
        handle = sliders.nth(i)
        cell = handle.locator("xpath=ancestor::*[contains(concat(' ', @class, ' '), ' jp-Cell ')]").element_handle()
        handle.scroll_into_view_if_needed()
        page.wait_for_timeout(500)
        before, value = page.evaluate(PICTURES, cell), handle.get_attribute("aria-valuenow")
        shoot(page, f"slider-{i}-before")
        handle.focus()
        for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
            handle.press(key)
            if handle.get_attribute("aria-valuenow") != value: break
        assert handle.get_attribute("aria-valuenow") != value, f"slider {i} does not move"
        end = time.time() + 10
        while time.time() < end and page.evaluate(PICTURES, cell) == before: page.wait_for_timeout(200)
        shoot(page, f"slider-{i}-after")
        changed.append(page.evaluate(PICTURES, cell) != before)
    assert any(changed), f"none of {len(changed)} sliders changed a picture"
