"""Execute notebooks the way this repository commits them.
  python tools/notebooks.py run [NB ...]     full budget, in place: outputs ready to commit, minutes noted in nbs/minutes.json
  python tools/notebooks.py page NB HTML     execute a copy and write it as one self-contained HTML page
Exit status 1 when a cell fails."""
import base64, datetime, hashlib, json, os, platform, re, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from nbdev.clean import nbdev_clean
from nbformat.v4.rwbase import split_lines
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parent.parent
CFG = get_config(path=ROOT)
MINUTES = ROOT/"nbs/minutes.json"
WIDGET = "application/vnd.jupyter.widget-view+json"
PLOTLY = "application/vnd.plotly.v1+json"   # needs a script; a still twin stands beside it
PAGE, PAGES = "application/vnd.vfm-lab.page", ROOT/"docs/pages"   # what an explorer's page must know: too large for a notebook
MATHJAX = ROOT/"docs/vendor/tex-svg-full.js"
MATHS = r"window.MathJax = {tex: {inlineMath: [['$', '$'], ['\\(', '\\)']], processEscapes: true}};"
REMOTE = re.compile(r"!\[([^\]]*)\]\(https?://[^)]*\)")   # a remote badge leaves its words
WALK = ("index.ipynb", "tour.ipynb", "00_lab.ipynb", "02_files.ipynb", "03_inputs.ipynb", "04_text.ipynb", "data",
        "tokens", "nn", "objectives", "models", "train", "adapt", "tasks", "viz", "studies", "06_golden.ipynb",
        "07_config.ipynb", "official", "08_hub.ipynb", "05_recipes.ipynb", "10_cli.ipynb", "20_parity.ipynb",
        "glossary.ipynb", "solutions")
RELATIVE = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")
META = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


def notebooks():
    "Every notebook of the lab in reading order: the tour, then room by room. Hidden and `_` names are not part of the lab."
    files = [p.relative_to(ROOT/"nbs") for p in (ROOT/"nbs").rglob("*.ipynb")]
    files = [p for p in files if not any(part[0] in "._" for part in p.parts)]
    def place(p): return WALK.index(p.parts[0]) if p.parts[0] in WALK else len(WALK), p.as_posix()
    return [ROOT/"nbs"/p for p in sorted(files, key=place)]

def execute(path):
    "Run a notebook from its own folder; returns (notebook, seconds, error or None)."
    nb = nbformat.read(path, 4)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ["VFM_LAB_PAGES"] = "1"
    start, error = time.time(), None
    client = NotebookClient(nb, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
                            extra_arguments=["--IPKernelApp.log_level=40"])
    try: client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as e: error = e
    return nb, time.time() - start, error

def tidy(nb):
    "Drop what must not be committed: widget state, widget views (a static twin stands beside them), cell metadata."
    nb.metadata = nbformat.from_dict(META)
    for cell in nb.cells:
        cell.metadata = nbformat.NotebookNode()
        if cell.cell_type == "code": cell.outputs = [o for o in map(without_widget, cell.outputs) if o]
    return nb

def without_widget(out):
    "The output without its live view; None when nothing but the widget's name is left."
    live = out.get("data", {}).pop(WIDGET, None)
    return None if live and set(out.data) <= {"text/plain"} else out

def store(nb):
    "Pages' scenes go into files of docs/pages/, named by their content; the notebook keeps the names."
    for out in page_outputs(nb):
        packed = base64.b64decode(out["data"][PAGE])
        out["data"][PAGE] = f"{hashlib.sha1(packed).hexdigest()[:12]}.z"
        PAGES.mkdir(exist_ok=True)
        (PAGES/out["data"][PAGE]).write_bytes(packed)

def page_outputs(nb): return [o for c in nb["cells"] for o in c.get("outputs", []) if PAGE in o.get("data", {})]

def prune():
    "Drop the scenes that no notebook names any more."
    named = {"".join(o["data"][PAGE]) for path in notebooks() for o in page_outputs(json.loads(path.read_text(encoding="utf-8")))}
    for path in PAGES.glob("*.z"):
        if path.name not in named: path.unlink()

def badge(nb, minutes):
    "Write the measured time into the chapter's badge line."
    said = f"{max(minutes, .1):.1f} min" if minutes < 1 else f"{minutes:.0f} min"
    for cell in nb.cells[:4]: cell.source = re.sub(r"\S+ min on 2 CPU cores", f"{said} on 2 CPU cores", cell.source)

def two_cores():
    "Keep this process and its kernels on two cores, where the system allows it; returns the number of cores."
    if not hasattr(os, "sched_setaffinity"): return os.cpu_count()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    return len(os.sched_getaffinity(0))

def machine(cores):
    "What the minutes were measured on."
    import torch
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    cpu = names[0] if names else platform.processor() or platform.machine()
    return f"{cores} cores of {cpu}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"

def run(paths):
    "Re-execute notebooks in place and note how long each took."
    where, failed = machine(two_cores()), []
    for path in paths:
        path = Path(path).resolve()
        name = path.relative_to(ROOT).as_posix()
        nb, seconds, error = execute(path)
        print(f"{seconds:7.1f} s  {name}{'  FAILED' if error else ''}", flush=True)
        if error:
            print(str(error)[-4000:], file=sys.stderr)
            failed.append(name)
            continue
        badge(nb, seconds/60)
        store(tidy(nb))
        path.write_text(json.dumps(split_lines(nb), indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        nbdev_clean(str(path))
        noted = json.loads(MINUTES.read_text()) if MINUTES.exists() else {}
        noted[name] = {"minutes": round(seconds/60, 2), "date": datetime.date.today().isoformat(), "machine": where}
        noted = {k: v for k, v in sorted(noted.items()) if (ROOT/k).exists()}
        MINUTES.write_text(json.dumps(noted, indent=1) + "\n")
    prune()
    return failed

def shown(out, plotly=True):
    "The output as a page shows it: an explorer that needs no kernel, a plotly figure with its script (True: inside; else where it lies), a GIF as HTML (the makers of pages know only still pictures)."
    if figure := out.get("data", {}).pop(PLOTLY, None):
        from plotly.io import to_html
        out["data"]["text/html"] = to_html(figure, full_html=False, include_plotlyjs=plotly, config={"displayModeBar": False}, validate=False)
    if scene := "".join(out.get("data", {}).get(PAGE, "")):
        from vfm_lab.viz.html import fragment
        out["data"] = {"text/html": fragment((PAGES/scene).read_bytes() if scene.endswith(".z") else base64.b64decode(scene))}
    if (gif := out.get("data", {}).pop("image/gif", None)) and "text/html" not in out["data"]:
        out["data"]["text/html"] = f'<img src="data:image/gif;base64,{"".join("".join(gif).split())}"/>'
    return out

def plain(nb, folder):
    "A notebook as its reader should see it outside Jupyter: no directives, hidden cells, remote pictures or relative links."
    def absolute(m): return f"[{m[1]}]({CFG['git_url']}/blob/{CFG['branch']}/{os.path.relpath(folder/m[2], ROOT)})"
    nb.cells = [c for c in nb.cells if not re.search(r"^#\| *(hide|include: *false|default_exp)\b", c.source, re.M)]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
            cell.outputs = [shown(o) for o in cell.outputs]
        else: cell.source = RELATIVE.sub(absolute, REMOTE.sub(r"\1", cell.source))
    return nb

def page(path, dst):
    "Execute a copy of a notebook and write it as one HTML file that needs no other file and no network."
    nb, seconds, error = execute(path)
    nb = plain(tidy(nb), path.parent)
    text, _ = HTMLExporter(embed_images=True, require_js_url="", mathjax_url="", jquery_url="").from_notebook_node(
        nb, resources={"metadata": {"path": str(path.parent), "name": path.stem}})
    head, body = text.split("</head>", 1)
    head = re.sub(r"<script[^>]*\bsrc=[^>]*></script>|<script type=.module.>.*?</script>", "", head, flags=re.S)
    tags = re.sub(r"(<script\b[^>]*>).*?</script>", r"\1", head + body, flags=re.S)
    style = "<style>blockquote {border-left: 4px solid #0072b2; padding-left: 1em}</style>"
    head += f"{style}\n<script>{MATHS}</script>\n<script>{MATHJAX.read_text(encoding='utf-8')}</script>\n</head>"
    outside = re.findall(r"<(?:script|img|iframe|link|source)\b[^>]*\b(?:src|href)=[\"'](?!data:)([^\"']+)", tags)
    dst.parent.mkdir(parents=True, exist_ok=True)
    dst.write_text(head + body, encoding="utf-8")
    print(f"{dst}: {dst.stat().st_size/1e6:.1f} MB, executed in {seconds:.0f} s")
    if outside: print("not self-contained, it refers to:", *outside, sep="\n  ", file=sys.stderr)
    if error: print(str(error)[-4000:], file=sys.stderr)
    return [path] if error or outside else []

def main(command=None, *args):
    if command == "run": return run(args or notebooks())
    if command == "page": return page(Path(args[0]).resolve(), Path(args[1]))
    sys.exit(__doc__)

if __name__ == "__main__": sys.exit(bool(main(*sys.argv[1:])))
