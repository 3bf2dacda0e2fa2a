"""The site without Quarto: nbdev processes the notebooks (directives, links, signatures), this file turns them into MyST,
Sphinx makes the pages.  python docs/build.py  writes _docs/."""
import ast, html, importlib, inspect, json, os, re, shutil, subprocess, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT/"tools")]
os.chdir(ROOT)

import execnb.nbio
import fastcore.docments
import nbdev.doclinks
import nbdev.processors
import nbdev.serve
import nbdev.serve_drv
import yaml
from notebooks import CFG, REMOTE, notebooks, shown
from readme import MARK, chapters, heading

SITE, PROC, WORK = ROOT/"_docs", ROOT/"_proc", ROOT/"_proc_site"
SOURCE = WORK/"source"
NUMBER = re.compile(r"(^|/)\d+[a-zA-Z0-9]*_([^/]*)$")
TAGS = {r"echo: *false": "remove-input", r"code-fold: *true": "hide-input", r"output: *false": "remove-output"}
ROOMS = {"tour.ipynb": "Start", "data": "Video in", "tokens": "Tokens", "nn": "Layers", "objectives": "Objectives",
         "models": "Models", "train": "Training", "adapt": "Adaptation", "tasks": "Tasks", "viz": "Pictures",
         "studies": "Studies", "official": "Official files", "08_hub.ipynb": "Front door and commands",
         "05_recipes.ipynb": "Front door and commands", "10_cli.ipynb": "Front door and commands",
         "20_parity.ipynb": "Front door and commands", "00_lab.ipynb": "Ground", "02_files.ipynb": "Ground",
         "03_inputs.ipynb": "Ground", "04_text.ipynb": "Ground", "06_golden.ipynb": "Ground",
         "07_config.ipynb": "Ground", "": "Reference", "solutions": "Solutions"}


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

def fold(cell):
    "Exported code that is not shown in the chapter stays on its page, folded: what is copied from a page runs."
    if "hide" in cell.directives_ or "default_exp" in cell.directives_: del cell["source"]
    elif cell.directives_.keys() & {"export", "exporti"}: cell.source = f"#| code-fold: true\n{cell.source}"

def signature(obj, **kwargs):
    "Annotations in quotes may name what was never imported; they are then shown as they stand."
    try: return inspect.signature(obj, **kwargs)
    except NameError: return inspect.signature(obj)

def process():
    "nbdev's own processing, in this process so that the patches hold; the result lies in _proc/."
    execnb.nbio.nb2dict, nbdev.processors._do_eval, fastcore.docments.signature = nb2dict, needed, signature
    fold.__name__, nbdev.processors.rm_export = "rm_export", fold
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

def markdown(text, folder):
    "Quarto's Markdown as MyST reads it, for a page in `folder`."
    def own(m): return f'<a href="{os.path.relpath(m[2], folder or ".")}{m[3]}"><code>{html.escape(m[1])}</code></a>'
    text = REMOTE.sub(r"\1", text.replace(MARK, chapters()))   # the site makes no calls
    text = re.sub(r"^```.*?^```", lambda m: re.sub(r"\[`([^`]+)`\]\([^)\s]*\)(\{[^}\n]*\})?", r"`\1`", m[0]), text, flags=re.M | re.S)   # no links inside code
    text = re.sub(r"(\]\([^)\s]*\))\{[^}\n]*\}", r"\1", text)
    text = re.sub(rf"\[`([^`]+)`\]\({re.escape(CFG['doc_host'] + CFG['doc_baseurl'])}/([^)#]+)(#[^)]*)?\)", own, text)
    return re.sub(r"(!?)\[([^\]]*)\]\((?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?\)", lambda m: link(m, folder), text)

def defined(cell):
    "What a code cell of the library defines: {name: names of its methods}."
    if cell["cell_type"] != "code" or not re.search(r"^#\| *code-fold", source := "".join(cell["source"]), re.M): return {}
    def inner(node): return [n for n in ast.iter_child_nodes(node) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    tree = ast.parse(source)
    return {n.name: [m.name for m in inner(n)] if isinstance(n, ast.ClassDef) else [] for top in (tree, *tree.body) if not isinstance(top, ast.FunctionDef | ast.ClassDef) for n in inner(top)}

def cards(cells):
    "nbdev's cards (heading, signature, one line), each right before the code that it is about. Where that code is shown, the signature is not said twice."
    drawn = {}
    for cell in cells:
        if name := cell["cell_type"] == "code" and re.search(r"^show_doc\((\w+)\)", "".join(cell["source"]), re.M): drawn[name[1]] = cell
    for cell in cells:
        if cell in drawn.values(): continue
        visible = "code-fold: show" in "".join(cell["source"])
        for name, methods in defined(cell).items():   # what has no card is still a place to link to
            text = card(drawn[name], name, not visible) if name in drawn else "".join(f'<span id="{n}"></span>' for n in [name.lower(), *(f"{name}.{m}".lower() for m in methods)])
            yield {"cell_type": "markdown", "id": f"{cell['id']}-{name}", "metadata": {}, "source": text}
        yield cell

def card(cell, name, signature):
    "Heading, signature if it is not shown below, the docstring and a link to the module."
    text = "".join("".join(o["data"].get("text/markdown", "")) for o in cell["outputs"] if "data" in o)
    source = re.search(r"\[source\]\(([^)]*)\)", text)
    block = re.search(r"^```python\n.*?^```\n*", text, re.M | re.S)
    line = text[block.end():].strip()
    return "\n\n".join(filter(None, [f"### `{name}`", signature and block[0].strip().replace("torch._C.", "torch."), f"{line} [source]({source[1]})"]))

def convert(path):
    "One processed notebook as a source of Sphinx."
    nb, name = json.loads(path.read_text(encoding="utf-8")), path.relative_to(PROC).as_posix()
    folder, cells = os.path.dirname(name), []
    for cell in cards(nb["cells"]):
        source = "".join(cell["source"])
        cell.pop("has_sd", None)
        if cell["cell_type"] == "raw":
            front = yaml.safe_load(source.strip().strip("-")) or {}
            cell, source = {**cell, "cell_type": "markdown"}, f"# {front.get('title', name)}\n\n*{front.get('description', '')}*".replace("\n\n**", "")
        if cell["cell_type"] == "markdown": source = markdown(source, folder)
        else:
            tags = [tag for pattern, tag in TAGS.items() if re.search(rf"^#\| *{pattern}", source, re.M)]
            cell["metadata"] = {"tags": tags} if tags else {}
            cell["outputs"] = [{"metadata": {}, **shown(o, os.path.relpath("_static/plotly.min.js", folder or "."))} if "data" in o else o for o in cell["outputs"]]
            source = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
        if source: cells.append({**cell, "source": source})
    if name == "index.ipynb": cells.append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": contents()})
    nb["metadata"].pop("widgets", None)
    dst = SOURCE/f"{named(name)}.ipynb"
    dst.parent.mkdir(parents=True, exist_ok=True)
    dst.write_text(json.dumps({**nb, "cells": cells}), encoding="utf-8")

def rooms():
    "The notebooks room by room, in reading order."
    found = {room: [] for room in ROOMS.values()}
    for path in notebooks():
        name = path.relative_to(ROOT/"nbs").as_posix()
        room = ROOMS.get(name) or ROOMS.get(os.path.dirname(name), os.path.dirname(name))
        if name != "index.ipynb": found.setdefault(room, []).append(path)
    return {room: paths for room, paths in found.items() if paths}

def page(path): return named(path.relative_to(ROOT/"nbs").as_posix())

def contents():
    "The side bar."
    return "\n\n".join(f"```{{toctree}}\n:hidden:\n:caption: {room}\n\n" + "\n".join([*map(page, paths), *["api"] * (room == ROOMS[""])]) + "\n```"
                       for room, paths in rooms().items())

def api():
    "One page with every public name of the library and its line, module by module."
    linked = nbdev.doclinks.NbdevLookup().linkify
    text = ["# API", "Every public function and class, with its one line. A name leads to the chapter that develops it: signature, source, tests."]
    for module, symbols in nbdev_index().items():
        if ".exercises" in module: continue
        own = [(name.removeprefix(f"{module}."), where) for name, (where, _) in symbols.items()]
        rows = [(name, where, inspect.getdoc(getattr(importlib.import_module(module), name))) for name, where in own if not re.search(r"(^|\.)_|\.", name)]
        text += [f"## {module}", "\n".join(f'- <a href="{where}"><code>{name}</code></a> {markdown(linked(line or ""), "")}' for name, where, line in rows)]
    return "\n\n".join(text)

def nbdev_index(): return importlib.import_module(f"{CFG['lib_name']}._modidx").d["syms"]

def llms():
    "llms.txt: the site for readers that are programs."
    site = CFG["doc_host"] + CFG["doc_baseurl"]
    text = [f"# {CFG['title']}", f"> {CFG['description']}", f"Each page is a notebook that develops one module of the library. Source: {CFG['git_url']}"]
    for room, paths in rooms().items():
        text += [f"## {room}", "\n".join(f"- [{title}]({site}/{page(path)}.html): {line}" for path in paths for title, line in [heading(path)])]
    return "\n\n".join(text) + "\n"

def main():
    process()
    shutil.rmtree(WORK, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    for path in sorted(PROC.rglob("*.ipynb")): convert(path)
    (SOURCE/"api.md").write_text(api(), encoding="utf-8")
    shutil.copy2(HERE/"conf.py", SOURCE)
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-j", "auto", "-b", "html", "-d", WORK/"doctrees", SOURCE, WORK/"html"]
    status = subprocess.run(sphinx).returncode
    if status == 0:
        shutil.rmtree(SITE, ignore_errors=True)
        shutil.move(WORK/"html", SITE)
        (SITE/"llms.txt").write_text(llms(), encoding="utf-8")
        print(f"{SITE}/index.html: {len(list(SITE.rglob('*.html')))} pages")
    return status

if __name__ == "__main__": sys.exit(main())
