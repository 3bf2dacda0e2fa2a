"""Decode-and-sample against bare decord on the same files: `python benchmarks/decode.py` (about a minute).

Ours: `read_frames(path, sampler)`, which opens the file, indexes it, picks the frame numbers and decodes them.
Bare decord: `VideoReader(path).get_batch(numbers)` with the numbers already known. Each pair of runs is timed back to back in
alternating order, and the ratio is the median over the pairs, so a busy machine slows both sides alike. The same
ratio is given per CPU second, which other work on the machine disturbs less. Results go to
`benchmarks/results/decode.json` and `decode.md`.
"""
import json, os, platform, statistics, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import av, decord
import numpy as np
from vfm_lab.data.reader import dense_indices, read_frames, sparse_indices

ROOT = Path(__file__).resolve().parents[1]
PAIRS = 15

def write_video(path: Path, width: int, height: int, frames: int, gop: int, codec: str = "libx264") -> Path:
    "A noisy moving texture, one slice per picture as cameras write it."
    rng = np.random.default_rng(0)
    texture = (rng.random((height // 8 + 80, width // 8 + 80, 3)) * 255).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as out:
        options = {"x264-params": "sliced-threads=0:slices=1"} if codec == "libx264" else {}
        stream = out.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.gop_size = width, height, "yuv420p", gop
        for i in range(frames):
            img = texture[i:i + height, 2 * i:2 * i + width] + rng.integers(0, 25, (height, width, 3))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(img.clip(0, 255).astype(np.uint8), format="rgb24")))
        out.mux(stream.encode())
    return path

def measure(paths: list[Path], sampler) -> dict:
    "Frame rates of both sides and the median ratio, over all files of one kind."
    numbers = {p: sampler(len(decord.VideoReader(str(p)))) for p in paths}
    sides = {
        "ours": lambda p: read_frames(p, lambda n: numbers[p]),
        "decord": lambda p: decord.VideoReader(str(p)).get_batch(numbers[p]).asnumpy(),
        "decord, 1 thread": lambda p: decord.VideoReader(str(p), num_threads=1).get_batch(numbers[p]).asnumpy(),
    }
    for p in paths: assert np.array_equal(sides["ours"](p).numpy(), sides["decord"](p)), f"{p.name}: frames differ"
    seconds, cpu = {name: [] for name in sides}, {name: [] for name in sides}
    for k in range(PAIRS):
        for name in list(sides)[::1 if k % 2 else -1]:
            start, work = time.perf_counter(), time.process_time()
            for p in paths: sides[name](p)
            seconds[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - work)
    count = sum(len(v) for v in numbers.values())
    rate = {name: round(count / statistics.median(v), 1) for name, v in seconds.items()}
    def ratio(took, other): return round(statistics.median(t / o for t, o in zip(took[other], took["ours"])), 2)
    return {"frames per second": rate,
            "ours / decord": ratio(seconds, "decord"),
            "ours / decord, 1 thread": ratio(seconds, "decord, 1 thread"),
            "ours / decord, per CPU second": ratio(cpu, "decord"),
            "ours / decord, 1 thread, per CPU second": ratio(cpu, "decord, 1 thread")}

def machine() -> dict:
    "What the numbers were taken on."
    info = Path("/proc/cpuinfo")
    named = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {"cpu": named[0] if named else platform.processor(), "cores": os.cpu_count(), "load before": round(os.getloadavg()[0], 1),
            "python": platform.python_version(), "torch": torch.__version__, "av": av.__version__, "decord": decord.__version__}

def main() -> None:
    decord.logging.set_level(decord.logging.QUIET)
    about, rows = machine(), {}
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
    lines = ["| files; sampler | frames/s: ours | decord | decord, 1 thread | ours ÷ decord | ÷ decord, 1 thread "
             "| per CPU second: ours ÷ decord | ÷ decord, 1 thread |"]
    lines += ["|---" * 8 + "|"]
    for name, r in rows.items():
        cells = [*r["frames per second"].values(), *list(r.values())[1:]]
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    table = "\n".join(lines)
    print(table)
    (ROOT / "benchmarks/results").mkdir(exist_ok=True)
    (ROOT / "benchmarks/results/decode.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
    head = ("# Decode and sample, against bare decord\n\nMade by `python benchmarks/decode.py`. The frames were compared first and are "
            "identical. Ratios are medians over pairs of runs; above 1 we are faster.\n")
    (ROOT / "benchmarks/results/decode.md").write_text(f"{head}\n{table}\n\n" + ", ".join(f"{k} {v}" for k, v in about.items()) + "\n")

if __name__ == "__main__": main()
