"""Sphinx settings; docs/build.py copies this file beside the converted notebooks."""
import os

from nbdev.config import get_config

cfg = get_config(path=os.getcwd())
project, author, copyright, release = cfg.title, cfg.author, cfg.copyright, cfg.version
extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure"]
html_theme = "furo"
html_title = cfg.title
html_static_path = [str(cfg.config_path/"docs/vendor/tex-svg-full.js")]
mathjax_path = "tex-svg-full.js"
html_theme_options = {"top_of_page_buttons": []}
html_copy_source = False
