"""Decode-and-sample against bare decord on the same files: `python benchmarks/decode.py` (about a minute).

Ours: `read_frames(path, sampler)`, which opens the file, indexes it, picks the frame numbers and decodes them.
Bare decord: `VideoReader(path).get_batch(numbers)` with the numbers already known. Each pair of runs is timed back to back in
alternating order, and the ratio is the median over the pairs, so a busy machine slows both sides alike. The same
ratio is given per CPU second, which other work on the machine disturbs less. Results go to
`benchmarks/results/decode.json` and `decode.md`.
"""
import tempfile, time
from pathlib import Path
import decord
import numpy as np
from _common import ROOT, alternate, faster, machine, report, seconds, write_video
from vfm_lab.data.reader import dense_indices, read_frames, sparse_indices

PAIRS = 15

def measure(paths: list[Path], sampler) -> dict:
    "Frame rates of both sides and the median ratio, over all files of one kind."
    numbers = {p: sampler(len(decord.VideoReader(str(p)))) for p in paths}
    sides = {
        "ours": lambda p: read_frames(p, lambda n: numbers[p]),
        "decord": lambda p: decord.VideoReader(str(p)).get_batch(numbers[p]).asnumpy(),
        "decord, 1 thread": lambda p: decord.VideoReader(str(p), num_threads=1).get_batch(numbers[p]).asnumpy(),
    }
    for p in paths: assert np.array_equal(sides["ours"](p).numpy(), sides["decord"](p)), f"{p.name}: frames differ"
    count = sum(len(v) for v in numbers.values())
    cpu = {name: [] for name in sides}
    def timed(name):
        start = time.process_time()
        for p in paths: sides[name](p)
        cpu[name].append(time.process_time() - start)
    took = alternate({name: lambda name=name: timed(name) for name in sides}, PAIRS)
    return {**{f"{name}, frames/s": round(count / seconds(v, 9), 1) for name, v in took.items()},
            **{f"ours ÷ {peer}": faster(took, "ours", peer) for peer in list(sides)[1:]}, **{f"per CPU second, ÷ {peer}": faster(cpu, "ours", peer) for peer in list(sides)[1:]}}

def main() -> None:
    decord.logging.set_level(decord.logging.QUIET)
    about, rows = machine("av", "decord"), {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = {
            "sample clips": sorted((ROOT / "data/clips").glob("*.mp4")),
            "320×240, 300 frames, key frame every 250": [write_video(folder / "a.mp4", 320, 240, 300, 250)],
            "340×256, 300 frames, key frame every 12": [write_video(folder / "b.mp4", 340, 256, 300, 12)],
            "640×360, 300 frames, key frame every 250": [write_video(folder / "c.mp4", 640, 360, 300, 250)],
        }
        samplers = {"sparse 8": lambda n: sparse_indices(n, 8, view=0), "dense 16×4": lambda n: dense_indices(n, 16, 4, view=2)}
        for kind, paths in files.items():
            for how, sampler in samplers.items():
                if paths: rows[f"{kind}; {how}"] = measure(paths, sampler)
    report("decode", "Decode and sample, against bare decord", "the frames were compared first and are identical. Ratios are medians over pairs of runs; above 1 we are faster.", about, {"files; sampler": rows})

if __name__ == "__main__": main()
