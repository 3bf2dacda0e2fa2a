"""Sphinx settings; docs/build.py copies this file beside the converted notebooks."""
import importlib
import os
from pathlib import Path

import plotly
from docutils import nodes
from nbdev.config import get_config

cfg = get_config(path=os.getcwd())
project, author, copyright, release = cfg.title, cfg.author, cfg.copyright, cfg.version
extensions = ["myst_nb", "sphinx_copybutton"]
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_code_prompt_show, nb_code_prompt_hide = "Show more code of this module", "Hide it"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure"]
html_theme = "furo"
html_title = cfg.title
html_favicon = str(cfg.config_path/"docs/favicon.svg")
html_static_path = [str(cfg.config_path/"docs/vendor/tex-svg-full.js"), str(cfg.config_path/"docs/site.css"),
                    str(Path(plotly.__file__).parent/"package_data/plotly.min.js")]
html_css_files = ["site.css"]
# a page opened as a file may not fetch other pages: the search then shows titles without summaries
html_js_files = [(None, {"body": "if (location.protocol === 'file:') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false"})]
mathjax_path = "tex-svg-full.js"
pygments_dark_style = "github-dark"
html_theme_options = {"top_of_page_buttons": []}
html_copy_source = False


def anchors(app, doctree):
    "The section of a symbol is called by the symbol's name, as nbdev's links expect, and answers for the methods too."
    page = f"{app.env.docname}.html#"
    names = [where.removeprefix(page) for module in importlib.import_module(f"{cfg.lib_name}._modidx").d["syms"].values()
             for where, _ in module.values() if where.startswith(page)]
    sections = {s[0].astext().lower(): s for s in doctree.findall(nodes.section) if isinstance(s[0][0], nodes.literal)}
    for name in names:
        if not (section := sections.get(name) or sections.get(name.rpartition(".")[0])): continue
        for other in doctree.findall(nodes.section):
            if name in other["ids"]: other["ids"] = [f"{i}-chapter" if i == name else i for i in other["ids"]]
        section["ids"] = [name, *(i for i in section["ids"] if "." in i)] if name in sections else [*section["ids"], name]

def setup(app): app.connect("doctree-read", anchors, priority=100)
