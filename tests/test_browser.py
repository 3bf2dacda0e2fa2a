"""JupyterLab as `make lab` starts it, in a real headless Chromium: the tour opens, Run All ends without errors, every control of its explorers works."""
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
from PIL import Image
from playwright.sync_api import TimeoutError, sync_playwright

from tools.browser import chromium, launch

ROOT = Path(__file__).resolve().parent.parent
SCREENS = Path(os.environ.get("SCREENS", ROOT/"_out/screens"))
LIMIT = 300  # seconds for Run All at smoke budget
SEEN = """root => JSON.stringify([...root.querySelectorAll("section[data-part]:not([hidden])")].map(s =>
    [s.dataset.part, s.querySelector("canvas").toDataURL(), s.querySelector(".vfm-charts").innerHTML, s.querySelector(".vfm-title").textContent])
    .concat([root.querySelector(".vfm-words").textContent]))"""


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

def run_all(lab, page, name):
    "Run > Run All Cells, through the menu; waits until every cell has run, without errors."
    path = lab.home/"nbs"/name
    page.get_by_text(re.compile(r"\(ipykernel\) \| Idle")).wait_for(timeout=60_000)
    kernel = lambda: next(s["kernel"]["execution_state"] for s in json.loads(get(f"{lab.url}/api/sessions", lab.token)[1]) if s["path"].endswith(name))
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    start, cells, errors = time.time(), [], []
    while time.time() - start < LIMIT and not errors:
        time.sleep(1)
        if kernel() != "idle": continue
        page.keyboard.press("Control+s")
        time.sleep(1)
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
        errors = [f"code cell {i}: {o['ename']}: {o['evalue']}" for i, c in enumerate(cells) for o in c["outputs"] if o["output_type"] == "error"]
        if all(c["execution_count"] for c in cells) and kernel() == "idle": break
    shoot(page, path.stem)
    assert not errors, errors
    waiting = [i for i, c in enumerate(cells) if not c["execution_count"]]
    assert cells and not waiting, f"code cells {waiting} of {len(cells)} were not run in {LIMIT} s"

def test_run_all(lab, page): run_all(lab, page, "tour.ipynb")


class Explorer:
    "One explorer of the page: what is drawn, and its controls."
    def __init__(self, page, index):
        self.page, self.root = page, page.locator(".jp-OutputArea .vfm-explorer").nth(index)
        self.root.wait_for(timeout=30_000)
        self.root.scroll_into_view_if_needed()
        page.wait_for_function("root => Number(root.dataset.paints) > 0", arg=self.root.element_handle(), timeout=30_000)

    def seen(self): return json.loads(self.root.evaluate(SEEN))
    def words(self): return self.seen()[-1]
    def says(self, pattern):
        "Wait until the words match."
        words = self.root.locator(".vfm-words").filter(has_text=re.compile(pattern))
        try: words.wait_for(timeout=10_000)
        except TimeoutError: raise AssertionError(f"{pattern!r} is not in {self.words()!r}") from None
        return re.search(pattern, self.words())
    def control(self, name): return self.root.locator(f"[data-control={name}]")
    def picture(self, part): return self.root.locator(f"section[data-part={part}] canvas")

    def changes(self, act, what):
        "Do something and wait until something else is drawn."
        before = self.seen()
        act()
        end = time.time() + 10
        while (after := self.seen()) == before:
            assert time.time() < end, f"{what} changes nothing that is drawn"
            self.page.wait_for_timeout(30)
        while (later := self.seen()) != after:   # the kernel's answer may follow
            after = later
            self.page.wait_for_timeout(100)
        return before, after

    def click(self, part, row, column, grid=8):
        box = self.picture(part).bounding_box()
        self.picture(part).click(position={"x": box["width"] * (column + .5) / grid, "y": box["height"] * (row + .5) / grid})


def every_control(explorer):
    "Each select, slider and toggle is turned to another value and back; each time something else is drawn."
    turned = []
    for control in explorer.root.locator("[data-control]").all():
        name, kind = control.get_attribute("data-control"), control.evaluate("e => e.type")
        if not control.is_visible() or kind == "submit" or name == "gif": continue
        if kind == "select-one":
            start = control.input_value()
            for value in [v for v in control.locator("option").all_inner_texts() if v != start][:1] + [start]:
                explorer.changes(lambda: control.select_option(value), f"{name} = {value}")  # noqa: B023
        elif kind == "range":
            control.focus()
            for key in ("ArrowRight", "ArrowLeft"): explorer.changes(lambda: control.press(key), f"{name}, {key}")  # noqa: B023
        else: continue
        turned.append(name)
    return turned

def test_mask_explorer_every_control(page):
    explorer = Explorer(page, 0)
    shoot(page, "masks")
    assert {"a", "b", "ratio", "seed", "layer", "head", "overlay", "frame"} <= set(every_control(explorer))
    for strategy in ("random", "tube", "frame", "running cell", "attention"):
        title = explorer.root.locator("section[data-part=a] .vfm-title")
        explorer.control("a").select_option(strategy)
        page.wait_for_function("([e, word]) => e.textContent.includes(word)", arg=[title.element_handle(), strategy])
        shoot(page, f"masks-{strategy.replace(' ', '-')}")

def test_mask_explorer_play(page):
    explorer = Explorer(page, 0)
    play = explorer.root.locator("[data-action=play]")
    explorer.picture("a").press("Space")
    frames = set()
    for _ in range(40):
        frames.add(explorer.control("frame").input_value())
        page.wait_for_timeout(60)
    play.click()
    assert len(frames) >= 4, f"in 2.4 s of playing only the frames {sorted(frames)} were shown"
    page.wait_for_timeout(600)
    still = explorer.control("frame").input_value()
    page.wait_for_timeout(800)
    assert explorer.control("frame").input_value() == still, "the second click does not stop the player"

def test_mask_explorer_click_on_a_patch(page):
    explorer = Explorer(page, 0)
    before, _ = explorer.changes(lambda: explorer.click("look", 2, 5), "a click on a patch")
    explorer.says("the patch in frame .*row 2, column 5")
    after = explorer.seen()
    assert [a[2] != b[2] for a, b in zip(before[:-1], after[:-1])] == [True, False, False]   # the charts of the masks stay
    shoot(page, "masks-patch")
    picture = explorer.picture("look")
    picture.focus()
    explorer.changes(lambda: (picture.press("ArrowDown"), picture.press("Enter")), "arrow and Enter on a picture")
    explorer.says("row 3, column 5")
    cells = page.locator(".jp-Notebook .jp-Cell").count()
    for key in "abddx": picture.press(key)   # JupyterLab's own keys: insert, delete, cut
    assert page.locator(".jp-Notebook .jp-Cell").count() == cells and explorer.root.count() == 1
    explorer.changes(lambda: explorer.control("query").click(), "letting the patch go")
    explorer.says("the class token")

def test_mask_explorer_predict_first(page):
    "Hide, draw by drag and by click, reveal, read the score."
    explorer = Explorer(page, 0)
    explorer.changes(explorer.control("predict").click, "Predict first")
    explorer.says("attention is hidden.* 0 of")
    box = explorer.picture("a").bounding_box()
    page.mouse.move(box["x"] + box["width"] * .4, box["y"] + box["height"] * .55)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * .7, box["y"] + box["height"] * .55, steps=6)
    page.mouse.up()
    explorer.changes(lambda: explorer.click("a", 5, 4), "a click on a patch while drawing")
    page.wait_for_timeout(500)
    assert int(explorer.says(r"([1-9]\d*) of \d+ patches marked")[1]) >= 3
    shoot(page, "masks-predict")
    explorer.changes(explorer.control("predict").click, "revealing")
    explorer.says(r"Score -?\d+ of 100")
    shoot(page, "masks-score")
    explorer.changes(lambda: explorer.control("a").select_option("attention"), "the way back")

def test_mask_explorer_gif(page, tmp_path):
    with page.expect_download(timeout=20_000) as wait: Explorer(page, 0).control("gif").click()
    wait.value.save_as(tmp_path/"out.gif")
    with Image.open(tmp_path/"out.gif") as gif: assert gif.format == "GIF" and gif.n_frames == 8

def test_attention_explorer_every_control(page):
    explorer = Explorer(page, 1)
    shoot(page, "attention")
    assert {"a", "b", "layer_a", "layer_b", "head_a", "head_b", "frame"} <= set(every_control(explorer))
    explorer.changes(lambda: explorer.control("head_b").select_option("rollout"), "rollout")
    explorer.changes(lambda: explorer.click("clip", 6, 1), "a click on a patch")
    explorer.says("row 6, column 1")
    shoot(page, "attention-patch")

def test_upload_takes_a_video(page):
    "A file that is no video is named in words; a video becomes an explorer."
    words = page.locator(".jp-OutputArea .widget-label").filter(has_text=re.compile("No file yet|cannot be read|frames of"))
    upload = page.locator(".jp-OutputArea .widget-upload input[type=file], .jp-OutputArea input[type=file]").first
    before = page.locator(".jp-OutputArea .vfm-explorer").count()
    def choose(name, data):
        button = page.locator(".jp-OutputArea button.widget-upload, .jp-OutputArea .widget-upload").first
        button.scroll_into_view_if_needed()
        if upload.count(): upload.set_input_files({"name": name, "mimeType": "video/mp4", "buffer": data})
        else:
            with page.expect_file_chooser() as chooser: button.click()
            chooser.value.set_files({"name": name, "mimeType": "video/mp4", "buffer": data})
    choose("notes.mp4", b"this is no video")
    words.filter(has_text="cannot be read").wait_for(timeout=15_000)
    choose("mine.mp4", (ROOT/"data/clips/03_down.mp4").read_bytes())
    words.filter(has_text="mine.mp4: 8 frames").wait_for(timeout=15_000)
    page.wait_for_function("n => document.querySelectorAll('.jp-OutputArea .vfm-explorer').length > n", arg=before, timeout=15_000)
    explorer = Explorer(page, before)
    explorer.changes(lambda: explorer.control("a").select_option("tube"), "a mask of the uploaded video")
    shoot(page, "upload")

def test_dark(page):
    "In JupyterLab's dark theme the explorers are dark, too."
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    for name in ("Theme", "JupyterLab Dark"): page.locator(".lm-Menu-item", has_text=name).first.click()
    page.locator("body[data-jp-theme-light=false]").wait_for(state="attached", timeout=10_000)
    page.locator("#jupyterlab-splash").wait_for(state="detached", timeout=20_000)
    for index, name in enumerate(("masks", "attention")):
        explorer = Explorer(page, index)
        ink = explorer.root.evaluate("e => getComputedStyle(e.querySelector('.vfm-words')).color.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + +b, 0)")
        assert ink > 450, f"the words of the {name} explorer are dark on dark"
        shoot(page, f"{name}-dark")

def chapter(lab, page, name):
    "A chapter run in a tab and a workspace of its own."
    tab = page.context.browser.new_page(viewport={"width": 1280, "height": 1000})
    tab.goto(f"{lab.url}/lab/workspaces/{Path(name).stem}/tree/nbs/{name}?token={lab.token}")
    tab.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
    run_all(lab, tab, name)
    return tab

def test_running_cell_explorer_every_control(lab, page):
    "The chapter of the running-cell explorer, in a tab of its own."
    tab = chapter(lab, page, "viz/14_running_cell.ipynb")
    explorer = Explorer(tab, 0)
    assert {"a", "b", "skip", "phase", "ratio", "seed", "overlay", "frame"} <= set(every_control(explorer))
    explorer.changes(lambda: explorer.control("a").select_option("random"), "random decoder mask")
    shoot(tab, "running-cell")
    tab.close()

def test_fusion_explorer_every_control(lab, page):
    "The chapter of the fusion explorer, in a tab of its own: the path and the comparison are redrawn."
    tab = chapter(lab, page, "viz/15_fusion.ipynb")
    explorer = Explorer(tab, 0)
    assert {"a", "b", "blocks", "layer", "frame"} <= set(every_control(explorer))
    assert explorer.root.locator("figure[data-chart=flow] svg").count() == 2 and explorer.root.locator("section[data-part=clip] figure[data-chart=choices]").count() == 4
    explorer.changes(lambda: explorer.control("a").select_option("parallel"), "parallel fusion")
    explorer.says("the matrix U joins the answers")
    shoot(tab, "fusion")
    tab.close()


# a page that was sent by somebody
