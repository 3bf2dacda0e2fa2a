"""Everything comes from settings.ini; only three things are added: the extras, and the top-level folders `data/` (default clips and
tiny weights) and `recipes/`, which travel in the wheel as the package folders `vfm_lab/_assets` and `vfm_lab/_recipes`."""
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
extras = {name: shlex.split(cfg[f"{name}_requirements"]) for name in ("decord", "notebooks", "dev")}
extras["dev"] += extras["notebooks"]
pythons = [f"3.{minor}" for minor in range(int(cfg["min_python"].split(".")[1]), int(cfg["max_python"].split(".")[1]) + 1)]
stages = {"2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    project_urls={
        "Source": cfg["git_url"],
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Issues": cfg["git_url"] + "/issues",
    },
    classifiers=[
        f"Development Status :: {stages[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        f"Natural Language :: {cfg['language']}",
        "Operating System :: OS Independent",
        "Framework :: Jupyter",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: {v}" for v in pythons),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg["requirements"]),
    extras_require=extras,
    packages=[*find_packages(include=["vfm_lab", "vfm_lab.*"]), "vfm_lab._assets", "vfm_lab._recipes"],
    package_dir={"vfm_lab._assets": "data", "vfm_lab._recipes": "recipes"},
    package_data={
        "vfm_lab": ["py.typed"],
        "vfm_lab._assets": ["*", "clips/*", "weights/*", "widgets/*", "*/*.json", "*/*.csv"],
        "vfm_lab._recipes": ["*.yaml"],
    },
    include_package_data=False,
    entry_points={
        "console_scripts": shlex.split(cfg["console_scripts"]),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
