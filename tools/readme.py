"""README.md from nbs/index.ipynb. Markdown is kept, links are turned to the repository's root, code becomes a code block with
its text output. The line <!-- chapters --> becomes the table of chapters: titles from the notebooks, minutes from nbs/minutes.json."""
import json, os, re

from notebooks import MINUTES, ROOT, notebooks

MARK = "<!-- chapters -->"
LINK = re.compile(r"(!?\[[^\]]*\]\()(?!\w+:|#|/)([^)\s]+)(?=[)\s])|(\b(?:src|href)=\")(?!\w+:|#|/)([^\"]+)")


def relink(text, start, end):
    "Relative links of a page in folder `start` rewritten for a page in folder `end`."
    def move(m): return (m[1] or m[3]) + os.path.relpath(start/(m[2] or m[4]), end).replace(os.sep, "/")
    return LINK.sub(move, text)

def heading(path):
    "Title and subtitle of a notebook: its first `# ` and `> ` lines."
    text = "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
    title, subtitle = re.search(r"^# (.+)$", text, re.M), re.search(r"^> (.+)$", text, re.M)
    return title[1].strip() if title else path.stem, subtitle[1].strip() if subtitle else ""

def chapters():
    "The table of chapters, one row per notebook, links relative to nbs/."
    noted = json.loads(MINUTES.read_text()) if MINUTES.exists() else {}
    rows, seen = ["| chapter | what it develops | minutes on 2 CPU cores |", "|---|---|---:|"], set()
    for path in notebooks():
        name, (title, subtitle) = path.relative_to(ROOT/"nbs").as_posix(), heading(path)
        if name == "index.ipynb" or name.startswith("solutions/"): continue
        minutes = noted.get(f"nbs/{name}", {}).get("minutes")
        rows.append(f"| [{title}]({name}) | {subtitle.rstrip('.')} | {'–' if minutes is None else f'{max(minutes, .1):.1f}'} |")
        if minutes is not None: seen.add((noted[f"nbs/{name}"]["machine"], noted[f"nbs/{name}"]["date"]))
    if seen:
        dates = sorted(d for _, d in seen)
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        rows += ["", f"Measured by `make notebooks` on {'; '.join(sorted({m for m, _ in seen}))} ({when})."]
    return "\n".join(rows)

def block(cell):
    "One cell of index.ipynb as Markdown; None for hidden cells."
    source = "".join(cell["source"])
    if re.search(r"^#\| *(hide|default_exp|include: *false)", source, re.M): return None
    if cell["cell_type"] == "markdown": return source.replace(MARK, chapters())
    shown = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
    parts = [] if re.search(r"^#\| *echo: *false", source, re.M) else [f"```python\n{shown}\n```"]
    for out in cell["outputs"]:
        data = out.get("data", {})
        if any(kind.startswith("image/") for kind in data): raise SystemExit("index.ipynb: show pictures by a Markdown link, not as an output")
        text = "".join(data.get("text/markdown") or "")
        plain = "".join(out.get("text") or data.get("text/plain") or "").rstrip()
        if text or plain: parts.append(text or f"```text\n{plain}\n```")
    return "\n\n".join(parts)

def readme():
    "The text of README.md."
    nb = json.loads((ROOT/"nbs/index.ipynb").read_text(encoding="utf-8"))
    note = "<!-- Made by tools/readme.py from nbs/index.ipynb: edit that. -->"
    body = "\n\n".join(filter(None, map(block, nb["cells"])))
    return relink(f"{note}\n\n{body}\n", ROOT/"nbs", ROOT)

if __name__ == "__main__": (ROOT/"README.md").write_text(readme(), encoding="utf-8")
