"""Video foundation models you can read, run and reuse. Rooms: data, tokens, nn, objectives, models, train, adapt, tasks, viz, official;
start at `vfm_lab.load`, `vfm_lab.train.loop.fit`, `vfm_lab.data.reader.read_clip`, or the notebook nbs/tour.ipynb."""
__version__ = "0.1.0"

_HUB = ("load", "fill", "create_model", "list_models", "plugin", "Loaded")


def __getattr__(name):
    "The front door opens when it is used: `import vfm_lab` stays cheap."
    if name not in _HUB: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vfm_lab import hub
    return getattr(hub, name)


def __dir__(): return sorted([*globals(), *_HUB])
