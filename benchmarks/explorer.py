"""How long a reader waits for an explorer: `python benchmarks/explorer.py` (about a minute; needs the extra `dev` and a Chromium).

In JupyterLab, in a real headless Chromium, a control of `MaskExplorer` is turned on the default clip, and the time until the
charts and the picture of the left mask are drawn anew is taken in the page. The peer, in the same notebook and the same run: an
ipywidgets slider that puts the same state into an Image widget, drawn by matplotlib (`picture`). Turns alternate.
Results go to `benchmarks/results/explorer.json` and `explorer.md`.
"""
import statistics, tempfile
from pathlib import Path
import nbformat
from _common import machine, report
from playwright.sync_api import sync_playwright
from tests.test_browser import Lab
from tools.browser import chromium, launch

TURNS = 24
CELL = '''
import ipywidgets as w
from vfm_lab.data.reader import read_clip
from vfm_lab.data.transforms import eval_transform
from vfm_lab.lab import asset
from vfm_lab.models.clip import tiny_clip
from vfm_lab.viz.explorer import MaskExplorer
from vfm_lab.viz.html import png

clip = eval_transform(64, stats="imagenet")(read_clip(asset("clips/tour.mp4"), frames=8))
explorer, still = (MaskExplorer(clip, tiny_clip().vision) for _ in range(2))
slider, image = w.IntSlider(0, 0, 19), w.Image(value=png(still))
slider.observe(lambda c: setattr(image, "value", png(still.set(seed=c.new))), "value")
display(w.VBox([slider, image]), explorer)
'''
OURS = """async ([root, name]) => {
    const control = root.querySelector(`[data-control=${name}]`), start = performance.now();
    const drawn = new Promise(done => { const o = new MutationObserver(() => { o.disconnect(); requestAnimationFrame(() => done(performance.now() - start)); });
                                        o.observe(root.querySelector("section[data-part=a] .vfm-charts"), { childList: true }); });
    if (control.options) control.selectedIndex = (control.selectedIndex + 1) % 3; else control.value = 5 + (+control.value + 1) % 8;   // settings whose masks differ
    control.dispatchEvent(new Event(control.options ? "change" : "input", { bubbles: true }));
    return await drawn; }"""
WATCH = """image => { window.waited = new Promise(done => addEventListener("keydown", () => { const start = performance.now();
    image.addEventListener("load", () => done(performance.now() - start), { once: true }); }, { once: true, capture: true })); }"""

def measure(page) -> dict:
    "Milliseconds of every turn, per control, ours and the peer's in turn."
    root, image, handle = (page.locator(s).first for s in (".jp-OutputArea .vfm-explorer", ".jp-OutputArea .widget-image", ".jp-OutputArea .noUi-handle"))
    root.locator("canvas").first.wait_for(timeout=60_000)
    page.wait_for_timeout(1000)
    times = {name: [] for name in ("seed", "ratio", "a", "layer", "peer: seed")}
    for turn in range(TURNS):
        for name in ("seed", "ratio", "a", "layer"):
            times[name].append(root.evaluate("(root, name) => (" + OURS + ")([root, name])", name))
            page.wait_for_timeout(100)
        image.evaluate(WATCH)
        handle.press("ArrowRight" if turn % 36 < 18 else "ArrowLeft")
        times["peer: seed"].append(page.evaluate("window.waited"))
        page.wait_for_timeout(100)
    return times

def main() -> None:
    about, path = machine(), chromium()
    with tempfile.TemporaryDirectory() as home:
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
        lab = Lab(Path(home)/"lab")
        try:
            nbformat.write(nb, Path(home)/"lab/nbs/bench.ipynb")
            with sync_playwright() as p:
                browser = launch(p, path)
                page = browser.new_page(viewport={"width": 1280, "height": 2000})
                page.goto(f"{lab.url}/lab/tree/nbs/bench.ipynb?token={lab.token}")
                page.locator(".jp-NotebookPanel .jp-Cell").first.click(timeout=60_000)
                page.wait_for_timeout(3000)
                page.keyboard.press("Shift+Enter")
                times = measure(page)
                browser.close()
        finally: lab.close()
    rows = {name: {"median ms": round(statistics.median(ms)), "worst ms": round(max(ms))} for name, ms in times.items()}
    ratio = round(rows["peer: seed"]["median ms"] / rows["seed"]["median ms"], 1)
    report("explorer", "The explorer's answer in JupyterLab", f"{TURNS} turns of each control, from the turn to the new picture, on the default clip. "
           f"The peer draws the same state with matplotlib into an Image widget; it takes {ratio} × as long.", about, {"turned": rows})

if __name__ == "__main__": main()
