"A saved explorer in a real Chromium. Apart from the tests of JupyterLab, whose Playwright stays open all along."
from playwright.sync_api import sync_playwright

from tools.browser import chromium, launch


def test_a_saved_page_obeys_its_own_policy(tmp_path):
    "Its script and styles run under the policy in its head; a title cannot bring a script of its own."
    from vfm_lab.data.reader import read_clip
    from vfm_lab.data.transforms import eval_transform
    from vfm_lab.lab import asset
    from vfm_lab.models.clip import tiny_clip
    from vfm_lab.viz.explorer import MaskExplorer
    from vfm_lab.viz.html import save_page
    title = "</title><script>document.title = 'run'</script>"
    kind = type("Titled", (MaskExplorer,), {"title": title})
    clip = eval_transform(64)(read_clip(asset("clips/tour.mp4"), 8))
    file = save_page(kind(clip, tiny_clip().vision), tmp_path/"page.html")
    evil = file.read_text(encoding="utf-8").replace("<body>", "<body><script>document.title = 'run'</script>")
    (tmp_path/"evil.html").write_text(evil, encoding="utf-8")
    path, said = chromium(), {}
    with sync_playwright() as p:
        browser = launch(p, path)
        for name in ("page.html", "evil.html"):
            page, said[name] = browser.new_page(), []
            page.on("console", lambda message, to=said[name]: to.append(message.text))
            page.on("pageerror", lambda error, to=said[name]: to.append(str(error)))
            page.goto((tmp_path/name).as_uri())
            page.wait_for_selector("canvas")
            assert page.title() == title
            drawn = page.locator(".vfm-explorer i").evaluate_all("all => all.map(e => e.style.background)")
            assert any("gradient" in style for style in drawn)
        browser.close()
    assert said["page.html"] == [] and len(said["evil.html"]) == 1 and "Content Security Policy" in said["evil.html"][0]
