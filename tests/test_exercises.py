"Every check of an exercise must refuse an empty answer: the stub that a chapter shows, and a function that returns nothing."
import importlib
import inspect
import pkgutil

import pytest

import vfm_lab.exercises

MODULES = [importlib.import_module(f"vfm_lab.exercises.{m.name}") for m in pkgutil.iter_modules(vfm_lab.exercises.__path__)]
CHECKS = [check for m in MODULES for name, check in inspect.getmembers(m, inspect.isfunction) if name.startswith("check_") and check.__module__ == m.__name__]


def stub(*args, **kwargs): raise NotImplementedError
def nothing(*args, **kwargs): return None


def test_every_module_has_checks(): assert all(any(c.__module__ == m.__name__ for c in CHECKS) for m in MODULES) and MODULES


@pytest.mark.parametrize("answer", [stub, nothing])
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: f"{c.__module__.rpartition('.')[2]}.{c.__name__}")
def test_an_empty_answer_is_refused(check, answer):
    try: check(answer)
    except Exception: return   # an assertion with a hint, or whatever the missing answer breaks
    pytest.fail("an empty answer passes")
