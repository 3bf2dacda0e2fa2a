"What the benchmarks share: the machine in words, alternating timing, peak memory, and the files with the results."
import json, os, platform, re, statistics, subprocess, sys, time
from importlib.metadata import version
from pathlib import Path
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

def machine(*packages: str, **more) -> dict:
    "What the numbers are taken on."
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    gpu = {"gpu": torch.cuda.get_device_name()} if DEVICE.type == "cuda" else {}
    return {"cpu": cpu[1].strip() if cpu else platform.processor(), "cores": len(os.sched_getaffinity(0)), **gpu, "load before": round(os.getloadavg()[0], 1),
            "system": platform.system(), "python": platform.python_version(), **{p: version(p) for p in ("torch", *packages)}, **more}

def alternate(sides: dict, pairs: int, clock=time.perf_counter) -> dict[str, list[float]]:
    "Seconds of every call of each side; all sides take turns, forwards and backwards."
    times = {name: [] for name in sides}
    for pair in range(pairs):
        for name in list(sides)[::1 if pair % 2 else -1]:
            start = clock()
            sides[name]()
            if DEVICE.type == "cuda": torch.cuda.synchronize()
            times[name].append(clock() - start)
    return times

def faster(times: dict[str, list[float]], name: str, peer: str) -> float:
    "How many times faster than the peer: the median over the pairs, so that a busy machine slows both sides alike."
    return round(statistics.median(p / o for p, o in zip(times[peer], times[name])), 2)

def seconds(times: list[float], digits: int = 2) -> float: return round(statistics.median(times), digits)

def high() -> float:
    "Largest memory of this process so far, in MB."
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def warm() -> None:
    "One step of a small layer, which loads what torch loads late."
    layer = torch.nn.Linear(64, 64, device=DEVICE)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(64, 64, device=DEVICE)).sum().backward()
    optimizer.step()

def peak(make, *, steps: int = 2) -> float:
    "Peak memory of a few steps in MB. `make` builds a side and returns its step; on a CPU what the process holds before is taken off, so use a fresh process."
    warm()
    if DEVICE.type == "cuda": torch.cuda.reset_peak_memory_stats()
    before = high() if DEVICE.type == "cpu" else 0
    step = make()
    for _ in range(steps): step()
    return torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else high() - before

def write_video(path: Path, width: int, height: int, frames: int, gop: int, codec: str = "libx264", seed: int = 0) -> Path:
    "A noisy moving texture, one slice per picture as cameras write it."
    import av
    rng = np.random.default_rng(seed)
    texture = (rng.random((height // 8 + 80, width // 8 + 80, 3)) * 255).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as out:
        options = {"x264-params": "sliced-threads=0:slices=1"} if codec == "libx264" else {}
        stream = out.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.gop_size = width, height, "yuv420p", gop
        for i in range(frames):
            img = texture[i:i + height, 2 * i:2 * i + width] + rng.integers(0, 25, (height, width, 3))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(img.clip(0, 255).astype(np.uint8), format="rgb24")))
        out.mux(stream.encode())
    return path

def in_process(file: str, *args) -> float:
    "The last number that a benchmark prints when it is called with arguments. Every tensor is given back to the system at once: without this, glibc's heap blurs a peak."
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, file, *map(str, args)], capture_output=True, text=True, env=env)
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    return float(done.stdout.split()[-1])

def table(rows: dict[str, dict], first: str) -> str:
    "Rows as markdown."
    head = list(next(iter(rows.values())))
    return "\n".join([f"| {first} | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|", *(f"| {n} | {' | '.join(map(str, r.values()))} |" for n, r in rows.items())])

def report(name: str, title: str, text: str, about: dict, tables: dict[str, dict[str, dict]]) -> None:
    "Print the tables (first column's name → rows) and write `results/NAME.json` and `.md`."
    body = "\n\n".join(table(rows, first) for first, rows in tables.items())
    print(body)
    out = ROOT/"benchmarks/results"
    rows = next(iter(tables.values())) if len(tables) == 1 else tables
    (out/f"{name}.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
    (out/f"{name}.md").write_text(f"# {title}\n\nMade by `python benchmarks/{name}.py`: {text}\n\n{body}\n\n" + ", ".join(f"{k} {v}" for k, v in about.items()) + "\n")
