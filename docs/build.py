"""The site without Quarto: nbdev processes the notebooks (directives, links, signatures), this file turns them into MyST,
Sphinx makes the pages.  python docs/build.py  writes _docs/."""
import html, inspect, json, os, re, shutil, subprocess, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT/"tools")]
os.chdir(ROOT)

import execnb.nbio
import fastcore.docments
import nbdev.processors
import nbdev.serve
import nbdev.serve_drv
import yaml
from notebooks import CFG, REMOTE, animated, notebooks
from readme import MARK, chapters

SITE, PROC, WORK = ROOT/"_docs", ROOT/"_proc", ROOT/"_proc_site"
SOURCE = WORK/"source"
NUMBER = re.compile(r"(^|/)\d+[a-zA-Z0-9]*_([^/]*)$")
TAGS = {r"echo: *false": "remove-input", r"code-fold: *true": "hide-input", r"output: *false": "remove-output"}
ROOMS = {"": "Start", "data": "Video in", "tokens": "Tokens", "nn": "Layers", "objectives": "Objectives", "models": "Models", "train": "Training",
         "adapt": "Adaptation", "tasks": "Tasks", "viz": "Pictures", "studies": "Studies", "solutions": "Solutions"}


def nb2dict(d, k=None):
    "execnb 0.1 takes every key `source` for text; the state of linked widgets has a list there."
    if k == "source" and isinstance(d, str): return d.splitlines(keepends=True)
    if isinstance(d, list): return [nb2dict(o) for o in d]
    if not isinstance(d, dict): return d
    return {k: nb2dict(v, k) for k, v in d.items() if k[-1] != "_"}

def needed(cell):
    "What must run so that signatures can be shown: exported cells. nbdev would also run every cell that imports, whatever else is in it."
    if cell.cell_type != "code" or not cell.source or not (body := cell.parsed_()): return False
    return bool(cell.directives_.keys() & {"export", "exports", "exporti", "exec_doc"} or nbdev.processors._show_docs(body))

def signature(obj, **kwargs):
    "Annotations in quotes may name what was never imported; they are then shown as they stand."
    try: return inspect.signature(obj, **kwargs)
    except NameError: return inspect.signature(obj)

def process():
    "nbdev's own processing, in this process so that the patches hold; the result lies in _proc/."
    execnb.nbio.nb2dict, nbdev.processors._do_eval, fastcore.docments.signature = nb2dict, needed, signature
    shutil.rmtree(PROC, ignore_errors=True)
    nbdev.serve.proc_nbs(str(ROOT/"nbs"), n_workers=0, force=True)

def named(name):
    "The path of a notebook's page on the site: without suffix and number."
    return NUMBER.sub(r"\1\2", name).removesuffix(".ipynb")

def link(m, folder):
    "One relative link of a notebook in `folder`: to a page of the site, to a copied picture, or to the file on GitHub."
    bang, words, target, anchor = m[1], m[2], m[3], m[4] or ""
    path = (ROOT/"nbs"/folder/target).resolve()
    if path.suffix == ".ipynb" and path.exists():
        return f"[{words}]({os.path.relpath(named(path.relative_to(ROOT/'nbs').as_posix()), folder or '.')}.ipynb{anchor})"
    if bang and path.is_file():
        flat = path.relative_to(ROOT).as_posix().replace("/", "-")
        (SOURCE/"_files").mkdir(exist_ok=True)
        shutil.copy2(path, SOURCE/"_files"/flat)
        return f"![{words}]({os.path.relpath('_files', folder or '.')}/{flat})"
    return f"{bang}[{words}]({CFG['git_url']}/blob/{CFG['branch']}/{os.path.relpath(path, ROOT)}{anchor})"

def anchor(m):
    "The name that links to a documented symbol use; Sphinx itself would turn its dots and underscores into hyphens."
    return f'<a id="{m[1].lower()}"></a>\n\n{m[0]}'

def markdown(text, folder):
    "Quarto's Markdown as MyST reads it, for a page in `folder`."
    def own(m): return f'<a href="{os.path.relpath(m[2], folder or ".")}{m[3]}"><code>{html.escape(m[1])}</code></a>'
    text = REMOTE.sub(r"\1", text.replace(MARK, chapters()))   # the site makes no calls
    text = re.sub(r"^#{2,4} (\S*[_.]\S*)$(?=\n\n```python)", anchor, text, flags=re.M)
    text = re.sub(r"^```.*?^```", lambda m: re.sub(r"\[`([^`]+)`\]\([^)\s]*\)(\{[^}\n]*\})?", r"`\1`", m[0]), text, flags=re.M | re.S)   # no links inside code
    text = re.sub(r"(\]\([^)\s]*\))\{[^}\n]*\}", r"\1", text)
    text = re.sub(rf"\[`([^`]+)`\]\({re.escape(CFG['doc_host'] + CFG['doc_baseurl'])}/([^)#]+)(#[^)]*)?\)", own, text)
    return re.sub(r"(!?)\[([^\]]*)\]\((?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?\)", lambda m: link(m, folder), text)

def convert(path):
    "One processed notebook as a source of Sphinx."
    nb, name = json.loads(path.read_text(encoding="utf-8")), path.relative_to(PROC).as_posix()
    folder, cells = os.path.dirname(name), []
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        cell.pop("has_sd", None)
        if cell["cell_type"] == "raw":
            front = yaml.safe_load(source.strip().strip("-")) or {}
            cell, source = {**cell, "cell_type": "markdown"}, f"# {front.get('title', name)}\n\n*{front.get('description', '')}*".replace("\n\n**", "")
        if cell["cell_type"] == "code" and re.search(r"^show_doc\(", source, re.M):
            source = "\n\n".join("".join(o["data"].get("text/markdown", "")) for o in cell["outputs"] if "data" in o).removeprefix("---\n")
            cell = {"cell_type": "markdown", "id": cell["id"], "metadata": {}}
        if cell["cell_type"] == "markdown": source = markdown(source, folder)
        else:
            tags = [tag for pattern, tag in TAGS.items() if re.search(rf"^#\| *{pattern}", source, re.M)]
            cell["metadata"] = {"tags": tags} if tags else {}
            cell["outputs"] = [{"metadata": {}, **animated(o)} if "data" in o else o for o in cell["outputs"]]
            source = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
        if source: cells.append({**cell, "source": source})
    if name == "index.ipynb": cells.append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": contents()})
    nb["metadata"].pop("widgets", None)
    dst = SOURCE/f"{named(name)}.ipynb"
    dst.parent.mkdir(parents=True, exist_ok=True)
    dst.write_text(json.dumps({**nb, "cells": cells}), encoding="utf-8")

def contents():
    "The side bar: room by room, in reading order."
    rooms = {}
    for path in notebooks():
        name = path.relative_to(ROOT/"nbs").as_posix()
        if name != "index.ipynb": rooms.setdefault(ROOMS.get(os.path.dirname(name), os.path.dirname(name)), []).append(named(name))
    return "\n\n".join(f"```{{toctree}}\n:hidden:\n:caption: {room}\n\n" + "\n".join(pages) + "\n```" for room, pages in rooms.items())

def main():
    process()
    shutil.rmtree(WORK, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    for path in sorted(PROC.rglob("*.ipynb")): convert(path)
    shutil.copy2(HERE/"conf.py", SOURCE)
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-j", "auto", "-b", "html", "-d", WORK/"doctrees", SOURCE, WORK/"html"]
    status = subprocess.run(sphinx).returncode
    if status == 0:
        shutil.rmtree(SITE, ignore_errors=True)
        shutil.move(WORK/"html", SITE)
        print(f"{SITE}/index.html: {len(list(SITE.rglob('*.html')))} pages")
    return status

if __name__ == "__main__": sys.exit(main())
