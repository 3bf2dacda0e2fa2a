"""Video foundation models you can read, run and reuse. Rooms: data, tokens, nn, objectives, models, train, tasks, viz; start at
`vfm_lab.models.umt`, `vfm_lab.train.loop.fit`, `vfm_lab.data.reader.read_clip`, or the notebook nbs/tour.ipynb."""
__version__ = "0.1.0"
