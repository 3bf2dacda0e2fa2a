"""Damaged video files: each is read or refused with `VideoReadError`, in bounded time, without a crash and without a word on stderr.

The files are read by worker processes, one file at a time, so a crash or a hang is charged to the right file; the worker is then
started again for the rest. `python tests/test_reader_faults.py --backend decord --bare` sends the same files through another
decoder and prints the tally: the reason why the reader's own choice is PyAV.
"""
import argparse, collections, os, random, subprocess, sys, tempfile, threading, time
from pathlib import Path
import numpy as np

SECONDS = 10            # per file; a healthy one takes 5 ms
BASES = {               # name: (container, codec, options, audio too)
    "h264.mp4":  ("mp4", "libx264", {"bf": "2"}, True),
    "fast.mp4":  ("mp4", "libx264", {"bf": "2"}, False),             # index in front of the data: a cut file still opens
    "frag.mp4":  ("mp4", "libx264", {}, False),                      # fragmented
    "mpeg4.mp4": ("mp4", "mpeg4", {}, False),
    "hevc.mp4":  ("mp4", "libx265", {"x265-params": "log-level=none"}, False),
    "h264.mkv":  ("matroska", "libx264", {}, True),
    "vp9.webm":  ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, False),
    "mpeg4.avi": ("avi", "mpeg4", {"bf": "2"}, False),
    "h264.ts":   ("mpegts", "libx264", {}, False),
}
MOVFLAGS = {"fast.mp4": {"movflags": "faststart"}, "frag.mp4": {"movflags": "frag_keyframe+empty_moov"}}

def write_base(path: Path, container: str, codec: str, options: dict, audio: bool, frames: int = 24) -> bool:
    "A small video with texture and motion; False where this FFmpeg has no such encoder."
    import av
    try: av.codec.Codec(codec, "w")
    except Exception: return False
    y, x = np.mgrid[:48, :64]
    with av.open(str(path), "w", format=container, options=MOVFLAGS.get(path.name, {})) as out:
        video = out.add_stream(codec, rate=25, options=options)
        video.width, video.height, video.pix_fmt, video.codec_context.gop_size = 64, 48, "yuv420p", 8
        sound = out.add_stream("aac", rate=16000) if audio else None
        if sound: sound.layout = "mono"
        for i in range(frames):
            img = np.stack([x * 3 + i * 7, y * 5 - i * 3, (x + y) * 2 + i], -1).astype(np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(img, format="rgb24")))
            if sound:
                wave = av.AudioFrame.from_ndarray(np.zeros((1, 640), np.int16), format="s16", layout="mono")
                wave.sample_rate, wave.pts = 16000, i * 640
                out.mux(sound.encode(wave))
        out.mux(video.encode())
        if sound: out.mux(sound.encode())
    return True

def mutate(data: bytes, kind: str, rng: random.Random) -> bytes:
    "One kind of damage at a random place."
    b, n = bytearray(data), len(data)
    a = rng.randrange(n)
    size = min(n - a, rng.choice([1, 16, 64, 256, 1024]))
    if kind == "truncate": return bytes(b[:a])
    if kind == "behead": return bytes(b[rng.randrange(1, n // 2):])
    if kind == "flip few":
        for _ in range(8): b[rng.randrange(n)] ^= 1 << rng.randrange(8)
    if kind == "flip many":
        for _ in range(n // 50): b[rng.randrange(n)] = rng.randrange(256)
    if kind == "flip header":
        for where in (0, max(n - 1500, 0)):
            for _ in range(6): b[min(where + rng.randrange(1500), n - 1)] ^= 1 << rng.randrange(8)
    if kind == "zero": b[a:a + size] = bytes(size)
    if kind == "ones": b[a:a + size] = b"\xff" * size
    if kind == "remove": del b[a:a + size]
    if kind == "repeat": b[a:a] = b[a:a + size]
    if kind == "swap":
        c = rng.randrange(n - size + 1)
        b[a:a + size], b[c:c + size] = b[c:c + size], b[a:a + size]
    return bytes(b)

KINDS = ["truncate", "behead", "flip few", "flip many", "flip header", "zero", "ones", "remove", "repeat", "swap"]

def make_files(folder: Path, per_kind: int, seed: int = 0) -> list[Path]:
    "Every base unharmed, then `per_kind` mutations of each kind."
    rng, files = random.Random(seed), []
    for name, spec in BASES.items():
        base = folder / name
        if not write_base(base, *spec): continue
        files.append(base)
        for kind in KINDS:
            for k in range(per_kind):
                path = base.with_name(f"{base.stem} {kind} {k}{base.suffix}")
                path.write_bytes(mutate(base.read_bytes(), kind, rng))
                files.append(path)
    return files

# --- the worker ----------------------------------------------------------------------------------------------------------------
def worker(backend: str, bare: bool) -> None:
    "Read the files named on stdin; one line of verdict for each."
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))          # a damaged header must not take all memory
    import torch
    from vfm_lab.data.reader import VideoReadError, linspace_indices, read_frames
    torch.set_num_threads(2)
    print("ready", flush=True)
    for line in sys.stdin:
        path, noise = line.rstrip("\n"), os.fstat(2).st_size
        try:
            if bare:
                import decord
                decord.logging.set_level(decord.logging.QUIET)
                reader = decord.VideoReader(path)
                clip = torch.from_numpy(reader.get_batch(linspace_indices(len(reader), 6)).asnumpy())
            else: clip = read_frames(path, lambda n: linspace_indices(n, 6), backend=backend)
            said = "read" if clip.dtype == torch.uint8 and clip.shape[0] == 6 and clip.shape[-1] == 3 else f"error\t{clip.shape}"
        except VideoReadError as e: said = f"refused\t{e}" if Path(path).name in str(e) else f"error\tdoes not name the file: {e}"
        except Exception as e: said = f"error\t{type(e).__name__}: {str(e)[:200]!r}"
        sys.stderr.flush()
        if os.fstat(2).st_size > noise: said = f"noise\t{Path('/proc/self/fd/2').resolve().read_bytes()[noise:][:200]!r}"
        print(said, flush=True)

def answer(p: subprocess.Popen, seconds: float) -> str | None:
    "The next line of a worker: '' when it has died, None when it hangs (it is then killed)."
    timer = threading.Timer(seconds, p.kill)
    timer.start()
    text = p.stdout.readline()
    late = timer.finished.is_set()
    timer.cancel()
    return text.rstrip("\n") if text else None if late else ""

def read_share(files: list[Path], backend: str, bare: bool, results: dict) -> None:
    "Read files one after the other; a crashed or hanging worker is replaced."
    command = [sys.executable, __file__, "--worker", "--backend", backend] + ["--bare"] * bare
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "PYTHONWARNINGS": "ignore"}
    todo = list(files)
    while todo:
        with tempfile.NamedTemporaryFile() as err, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err,
                                                                    text=True, env=env) as p:
            if answer(p, 120) != "ready":
                results[todo.pop(0)] = "crash\tthe worker did not start"
                continue
            said = "go"
            while todo and said:
                path = todo.pop(0)
                p.stdin.write(f"{path}\n")
                p.stdin.flush()
                said = answer(p, SECONDS)
                results[path] = said or (f"hang\tmore than {SECONDS} s" if said is None else f"crash\tsignal {-p.wait()}")

def read_all(files: list[Path], backend="auto", bare=False, workers=2) -> dict[Path, str]:
    "The verdict on each file, from `workers` processes side by side."
    results = {}
    threads = [threading.Thread(target=read_share, args=(files[k::workers], backend, bare, results)) for k in range(workers)]
    for t in threads: t.start()
    for t in threads: t.join()
    return results

def test_damaged_files(tmp_path):
    files = make_files(tmp_path, per_kind=5)
    assert len(files) >= 200
    results = read_all(files)
    assert len(results) == len(files)
    bad = {p.name: said for p, said in results.items() if said.split("\t")[0] not in ("read", "refused")}
    assert not bad, "\n".join(f"{name}: {said}" for name, said in bad.items())
    whole = [p.name for p in files if p.name in BASES and results[p] != "read"]
    assert not whole, f"unharmed files refused: {whole}"
    verdicts = collections.Counter(said.split("\t")[0] for said in results.values())
    assert verdicts["refused"] > 20 and verdicts["read"] > 20, verdicts
    print(f"{len(files)} files: {dict(verdicts)}")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--bare", action="store_true", help="decord alone, without the reader")
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--per-kind", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    if a.worker: worker(a.backend, a.bare)
    else:
        with tempfile.TemporaryDirectory() as folder:
            start, results = time.time(), read_all(make_files(Path(folder), a.per_kind, a.seed), a.backend, a.bare)
            print(collections.Counter(said.split("\t")[0] for said in results.values()), f"{time.time() - start:.0f} s")
            for p, said in results.items():
                if said.split("\t")[0] not in ("read", "refused"): print(p.name, said[:160])
