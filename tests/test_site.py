"""The built site (`make docs`): every link and anchor resolves, and it works in a real headless Chromium with the network blocked,
served and opened as files. Pages made for reading without a kernel work too."""
import functools
import json
import os
import re
import threading
from collections import Counter
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import nbformat
import pytest
from playwright.sync_api import sync_playwright

from tools.browser import chromium, launch
from tools.notebooks import notebooks, page_outputs, shown
from tools.notebooks import page as write_page
from vfm_lab._modidx import d as INDEX

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT/"_docs"
SCREENS = Path(os.environ.get("SCREENS", ROOT/"_out/screens"))
CANVASES = "e => [...e.querySelectorAll('canvas')].map(c => c.toDataURL()).join()"
CELL = """import torch
from vfm_lab.models.clip import tiny_clip
from vfm_lab.viz.explorer import MaskExplorer
MaskExplorer(torch.rand(3, 2, 64, 64), tiny_clip().vision)"""
SYMBOLS = {name.removeprefix(f"{module}."): where for module, names in INDEX["syms"].items() for name, (where, _) in names.items()}


class Page(HTMLParser):
    "What a page refers to, what it can be referred to by, and the words it shows as code in running text that lead nowhere."
    def __init__(self, path):
        super().__init__()
        self.ids, self.refs, self.words, self.open = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("id"): self.ids.append(attrs["id"])
        self.refs += [attrs[k] for k in ("href", "src") if attrs.get(k)]
        if tag in ("a", "code", "pre", "h1", "h2", "h3", "h4"): self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open: self.open.remove(tag)

    def handle_data(self, data):
        if self.open == ["code"]: self.words.append(data)


@pytest.fixture(scope="module")
def pages():
    "Every page of the site by its path."
    assert (SITE/"index.html").exists(), "there is no site yet: make docs"
    return {p.relative_to(SITE).as_posix(): Page(p) for p in sorted(SITE.rglob("*.html"))}

@pytest.fixture(scope="module")
def browser():
    path = chromium()
    with sync_playwright() as p:
        browser = launch(p, path)
        yield browser
        browser.close()

@pytest.fixture(scope="module")
def served(pages):
    "The site on a local server."
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()

@contextmanager
def visitor(browser, home, width=1280, scheme="light"):
    "A tab that reaches nothing but `home`; what went wrong in it is a failure at the end."
    wrong, context = [], browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=scheme)
    def gate(route):
        if route.request.url.startswith(home): return route.continue_()
        wrong.append(f"asked for {route.request.url[:200]}")
        route.abort()
    context.route(re.compile(r"^(?!data:|blob:)"), gate)
    tab = context.new_page()
    tab.on("console", lambda m: m.type == "error" and wrong.append(f"console: {m.text}"))
    tab.on("pageerror", lambda e: wrong.append(f"page error: {e}"))
    yield tab
    context.close()
    assert not wrong, wrong

def shoot(what, name):
    SCREENS.mkdir(parents=True, exist_ok=True)
    what.screenshot(path=SCREENS/f"site-{name}.png")

def choose(tab, theme):
    "Click the switch of the page until the theme is the one asked for."
    for _ in range(3):
        if tab.locator("body").get_attribute("data-theme") == theme: break
        tab.locator(".theme-toggle:visible").first.click()
    assert tab.locator("body").get_attribute("data-theme") == theme
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)")
    assert paper > 600 if theme == "light" else paper < 150

def explorers():
    "Pages of the site and the sizes, in bytes, of what their notebooks hold for pages."
    for path in notebooks():
        outputs = page_outputs(json.loads(path.read_text(encoding="utf-8")))
        name = re.sub(r"(^|/)\d+[a-zA-Z0-9]*_([^/]*)$", r"\1\2", path.relative_to(ROOT/"nbs").as_posix()).replace(".ipynb", ".html")
        if outputs: yield name, [len(shown(o)["data"]["text/html"].encode()) for o in outputs]

def test_links(pages):
    "Every internal link leads to a file and, where it names one, to an anchor; no name is given twice on a page."
    wrong = [f"{name}: {i} is there {n} times" for name, page in pages.items() for i, n in Counter(page.ids).items() if n > 1]
    for name, page in pages.items():
        for ref in sorted({r for r in page.refs if not re.match(r"\w+:", r)}):
            url = urlsplit(urljoin(f"/{name}", ref))
            path, anchor = unquote(url.path)[1:], unquote(url.fragment)
            if not (SITE/path).is_file(): wrong.append(f"{name}: {ref} leads nowhere")
            elif anchor and path in pages and anchor not in pages[path].ids: wrong.append(f"{name}: {ref} names no place")
    assert not wrong, "\n".join(wrong)

def test_api(pages):
    "Every symbol of the library has its place on the page that nbdev's index names; where running text names a public one, it is a link."
    wrong = [f"{name}: no #{where.split('#')[1]}" for name, where in SYMBOLS.items()
             if where.split("#")[1] not in pages[where.split("#")[0]].ids]
    public = {name for name in SYMBOLS if re.search(r"_|\.|[a-z][A-Z]", name) and not re.search(r"(^|\.)_", name)}   # a word such as `show` may be anybody's
    wrong += [f"{name}: `{word}` is no link" for name, page in pages.items() for word in sorted(set(page.words)) if word.removesuffix("()") in public]
    assert not wrong, "\n".join(wrong)

def test_llms(pages):
    "llms.txt: title, description, and one line per notebook that leads to its page."
    text = (SITE/"llms.txt").read_text(encoding="utf-8")
    assert re.match(r"# vfm_lab\n\n> .+\n", text)
    found = re.findall(r"^- \[[^\]]+\]\(https://[^/]+/vfm_lab/([^)]+)\): .+$", text, re.M)
    assert len(found) == len(notebooks()) - 1 and set(found) <= pages.keys()

@pytest.mark.parametrize("theme", ["light", "dark"])
def test_landing(browser, served, theme):
    with visitor(browser, served) as tab:
        tab.goto(served)
        choose(tab, theme)
        assert tab.locator("article img").first.evaluate("i => i.complete && i.naturalWidth > 300")
        assert tab.locator("#three-doors > section").count() == 3
        assert tab.locator("#a-walk-through-the-rooms li a").count() > 15
        shoot(tab, f"landing-{theme}")
        tab.evaluate("document.querySelector('#three-doors').scrollIntoView()")
        shoot(tab, f"landing-doors-{theme}")

@pytest.mark.parametrize("theme", ["light", "dark"])
def test_chapter(browser, served, theme):
    "Pictures, equations, code with a copy button, and the API's anchors."
    with visitor(browser, served) as tab:
        tab.goto(f"{served}tokens/masking.html")
        choose(tab, theme)
        tab.locator("mjx-container svg").first.wait_for(state="attached", timeout=30_000)
        sizes = tab.locator("article img").evaluate_all("all => all.map(i => i.naturalWidth)")
        assert len(sizes) > 8 and min(sizes) > 100
        if theme == "dark": assert tab.locator("article img").first.evaluate("i => getComputedStyle(i).backgroundColor") == "rgb(255, 255, 255)"
        assert tab.locator("article pre").count() > 20 and tab.locator("button.copybtn").count() > 20
        assert not tab.locator("article", has_text="torch._C").count()
        for name in ("random_mask", "attention_sampled_mask", "running_cell_mask"):
            place = tab.locator(f"section#{name}")
            assert place.locator("h3").count() == 1 and place.locator("pre", has_text=f"def {name}(").count() == 1   # said once
        tab.goto(f"{served}tokens/masking.html#attention_sampled_mask")
        tab.wait_for_function("(y => y >= 0 && y < 300)(document.querySelector('#attention_sampled_mask h3').getBoundingClientRect().y)", timeout=10_000)
        tab.wait_for_timeout(800)   # the page glides to its place
        shoot(tab, f"chapter-{theme}")

@pytest.mark.parametrize("name", ["index.html", "tokens/masking.html"])
def test_small_screen(browser, served, name):
    "Nothing but code and tables scrolls sideways on a telephone."
    with visitor(browser, served, width=400, scheme="dark") as tab:
        tab.goto(served + name)
        tab.wait_for_load_state("networkidle")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400
        shoot(tab, f"small-{Path(name).stem}")

@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("way", ["served", "file"])
def test_search(browser, served, way, theme):
    "From the landing page to a hit, with summaries when served, without when opened as a file."
    home = served if way == "served" else SITE.as_uri() + "/"
    with visitor(browser, home, scheme=theme) as tab:
        tab.goto(f"{home}index.html")
        tab.locator(".sidebar-search:visible").fill("running cell")
        tab.locator(".sidebar-search:visible").press("Enter")
        tab.get_by_text(re.compile(r"found \d+ pages")).wait_for(timeout=20_000)
        if way == "served": tab.locator("#search-results .context").first.wait_for(timeout=20_000)
        else: assert not tab.locator("#search-results .context").count()
        shoot(tab, f"search-{way}-{theme}")
        tab.locator("#search-results a[href*='tokens/masking.html']").first.click()
        tab.locator("h1", has_text="Masking").wait_for()
        assert tab.url.startswith(f"{home}tokens/masking.html")

def test_explorers_are_shown(pages, browser, served):
    "What a notebook holds for pages is on its page: it mounts, its first choice changes the picture, and it is small enough to load."
    found = list(explorers())
    assert found, "no notebook holds an explorer for its page: make notebooks"
    for name, sizes in found:
        assert max(sizes) <= 2e6, f"{name}: {max(sizes)} bytes"
        for theme in ("light", "dark"):
            with visitor(browser, served, scheme=theme) as tab:
                tab.goto(served + name)
                drawn = tab.locator(".vfm-explorer")
                assert drawn.count() == len(sizes), f"{name} shows {drawn.count()} of {len(sizes)} explorers"
                for i in range(len(sizes)):
                    one = drawn.nth(i)
                    one.scroll_into_view_if_needed()
                    tab.wait_for_function("e => +e.dataset.paints >= 1", arg=one.element_handle(), timeout=20_000)
                    before, paints = one.evaluate(CANVASES), int(one.get_attribute("data-paints"))
                    shoot(one, f"{name[:-5].replace('/', '-')}-{i}-{theme}")
                    choice = one.locator("select").first
                    choice.select_option(index=0 if choice.evaluate("s => s.selectedIndex") else 1)
                    tab.wait_for_function("([e, n]) => +e.dataset.paints > n", arg=[one.element_handle(), paints], timeout=20_000)
                    assert before and one.evaluate(CANVASES) != before, f"{name}: the first choice of explorer {i} changes nothing"
                    shoot(one, f"{name[:-5].replace('/', '-')}-{i}-chosen-{theme}")

def test_page_of_a_notebook(browser, tmp_path):
    "`make tour` writes one file whose explorers work without a server."
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)]), tmp_path/"one.ipynb")
    assert write_page(tmp_path/"one.ipynb", tmp_path/"one.html") == []
    with visitor(browser, tmp_path.as_uri()) as tab:
        tab.goto((tmp_path/"one.html").as_uri())
        tab.locator(".vfm-explorer[data-paints]").wait_for(timeout=20_000)
        shoot(tab, "one-file")

@pytest.mark.parametrize("theme", ["light", "dark"])
def test_plotly_is_drawn(browser, served, theme):
    "The one interactive chart draws itself from the site's own copy of plotly, and says what is under the pointer."
    with visitor(browser, served) as tab:
        tab.goto(f"{served}studies/uniformerv2_blocks.html")
        choose(tab, theme)
        chart = tab.locator(".js-plotly-plot")
        chart.locator(".main-svg").first.wait_for(state="attached", timeout=20_000)
        chart.scroll_into_view_if_needed()
        assert chart.locator("g.points path").count() > 30
        shoot(chart, f"plotly-{theme}")
