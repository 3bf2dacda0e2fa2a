"""Everything comes from settings.ini; only two things are added: the extras, and the top-level folder `data/`
(default clips and tiny weights), which travels in the wheel as the package folder `vfm_lab/_assets`."""
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
notebooks, dev = shlex.split(cfg["notebooks_requirements"]), shlex.split(cfg["dev_requirements"])

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={"notebooks": notebooks, "dev": notebooks + dev},
    packages=[*find_packages(include=["vfm_lab", "vfm_lab.*"]), "vfm_lab._assets"],
    package_dir={"vfm_lab._assets": "data"},
    package_data={"vfm_lab._assets": ["*", "clips/*", "weights/*", "widgets/*", "*/*.json", "*/*.csv"]},
    include_package_data=False,
    entry_points={
        "console_scripts": shlex.split(cfg["console_scripts"]),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
