"Every public class, function and method says in one line what it does; every parameter and every result has a type."
import importlib
import inspect
import pkgutil

import pytest

import vfm_lab

NAMES = [m.name for m in pkgutil.walk_packages(vfm_lab.__path__, "vfm_lab.") if ".exercises" not in m.name and not m.name.endswith("_modidx")]
PUBLIC = [getattr(m, name) for m in map(importlib.import_module, NAMES) for name in getattr(m, "__all__", ())]
CLASSES = [o for o in PUBLIC if inspect.isclass(o) and o.__module__.startswith("vfm_lab.")]   # not names of types such as dict[str, Tensor]
METHODS = [f for c in CLASSES for name, f in vars(c).items()
           if inspect.isfunction(f) and f.__module__ != "typing" and (name == "__init__" or not name.startswith("_"))]   # a protocol gets typing's __init__
FUNCTIONS = [o for o in PUBLIC if inspect.isfunction(o)] + METHODS


def label(o): return f"{o.__module__}.{o.__qualname__}"


@pytest.mark.parametrize("o", CLASSES + [f for f in FUNCTIONS if f.__name__ != "__init__"], ids=label)
def test_one_line_says_what_it_does(o):
    "What it raises, and where a paper says it, may stand below: at most three lines."
    first, *rest = (inspect.getdoc(o) or "").splitlines()   # a method may inherit its line
    assert first and (not rest or not rest[0] and len(rest) <= 4)


@pytest.mark.parametrize("f", FUNCTIONS, ids=label)
def test_everything_has_a_type(f):
    signature = inspect.signature(f)
    named = [p for p in signature.parameters.values() if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert not [p.name for p in named if p.annotation is p.empty]
    assert f.__name__ == "__init__" or signature.return_annotation is not signature.empty
