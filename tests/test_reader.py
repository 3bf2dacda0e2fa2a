"""The reader on awkward files, its refusals, and the samplers against values worked out by hand.

Every frame carries its own number as a bar code, so "the right frame" is read off the picture.
"""
import os, struct, subprocess, sys, warnings
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
import av
import numpy as np
import pytest
import torch
from vfm_lab.data import reader
from vfm_lab.data.reader import (VideoReadError, backends, dense_indices, interval_indices, linspace_indices, probe, read_clip,
                                 read_frames, span_indices, sparse_indices)

def picture(i: int, width: int, height: int) -> np.ndarray:
    "Frame i: a gradient, and i in binary as 8 bars over the whole height, lowest bit left."
    x = np.arange(width)
    bars = np.where(i >> np.minimum(x * 8 // width, 7) & 1, 220, 30)
    shade = np.linspace(0, 20, height)[:, None] + bars
    return np.repeat(shade[..., None], 3, -1).astype(np.uint8)

def numbers(frames: torch.Tensor) -> list[int]:
    "The number on each frame."
    t, h, w, _ = frames.shape
    at = [int((b + .5) * w / 8) for b in range(8)]
    return [sum(int(f[h // 2, x, 1] > 125) << b for b, x in enumerate(at)) for f in frames]

def write(path: Path, frames=40, size=(96, 64), codec="libx264", pix="yuv420p", format=None, options=None, gop=12, bf=2, start=0,
          steps=lambda i: 4 * i, second=None, audio=False) -> Path:
    "A video of numbered frames; `second`: (width, height) of one more video stream with the numbers counted down."
    try: av.codec.Codec(codec, "w")
    except Exception: pytest.skip(f"this FFmpeg cannot write {codec}")
    with av.open(str(path), "w", format=format) as out:
        streams = []
        for k, (width, height) in enumerate([size] + [second] * bool(second)):
            s = out.add_stream(codec, rate=25, options=options or {})
            s.width, s.height, s.pix_fmt, s.codec_context.gop_size = width, height, pix, gop
            s.codec_context.time_base = Fraction(1, 100)
            if codec in ("libx264", "mpeg4"): s.codec_context.max_b_frames = bf
            streams.append((s, width, height, k))
        sound = out.add_stream("aac", rate=16000) if audio else None
        if sound: sound.layout = "mono"
        for i in range(frames):
            for s, width, height, k in streams:
                frame = av.VideoFrame.from_ndarray(picture(i if not k else 255 - i, width, height), format="rgb24")
                frame.pts, frame.time_base = steps(i) + start, Fraction(1, 100)
                out.mux(s.encode(frame))
            if sound:
                wave = av.AudioFrame.from_ndarray(np.zeros((1, 640), np.int16), format="s16", layout="mono")
                wave.sample_rate, wave.pts = 16000, i * 640
                out.mux(sound.encode(wave))
        for s in [s for s, *_ in streams] + [sound] * audio: out.mux(s.encode())
    return path

X265 = {"x265-params": "log-level=none"}
AWKWARD = {
    "plain.mp4": {"options": {"sc_threshold": "0"}},
    "many B frames.mp4": {"bf": 3, "gop": 30},
    "start time.mp4": {"start": 700},
    "start time.mkv": {"start": 700, "format": "matroska"},
    "variable rate.mp4": {"steps": lambda i: 4 * i + i * i % 3},
    "adjacent key frames.mp4": {"gop": 1},
    "open gop h264.mp4": {"options": {"x264-params": "open-gop=1:keyint=12:bframes=3"}},
    "open gop hevc.mp4": {"codec": "libx265", "options": {"x265-params": "open-gop=1:keyint=12:bframes=3:log-level=none"}},
    "hevc 10 bit.mp4": {"codec": "libx265", "pix": "yuv420p10le", "options": X265},
    "av1.mp4": {"codec": "libsvtav1"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "quality": "good"}},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "B frames.avi": {"codec": "mpeg4"},
    "h264.avi": {"format": "avi"},
    "stream.ts": {"format": "mpegts"},
    "raw.h264": {"format": "h264"},
    "odd size.mp4": {"size": (97, 63), "codec": "mpeg4"},
    "odd 444.mp4": {"size": (97, 63), "pix": "yuv444p"},
    "422.mp4": {"pix": "yuv422p"},
    "gray.mkv": {"codec": "ffv1", "pix": "gray"},
    "one frame.mp4": {"frames": 1},
    "sound.mp4": {"audio": True},
    "two streams.mp4": {"second": (192, 128), "audio": True},
    "large first.mp4": {"size": (192, 128), "second": (96, 64), "audio": True},
}

@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("videos")

def made(folder: Path, name: str) -> Path:
    os.environ.setdefault("SVT_LOG", "0")
    path = folder / name
    return path if path.exists() else write(path, **AWKWARD[name])

def quiet_read(*args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_frames(*args, **kw)

# --- the right frames, from each decoder ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", AWKWARD)
def test_right_frames_in_any_order(folder, name):
    path = made(folder, name)
    info = probe(path)
    assert info.frames == AWKWARD[name].get("frames", 40) and info.fps > 0
    assert (info.width, info.height) == AWKWARD[name].get("size", (96, 64))          # the default stream, as ffmpeg chooses
    rng = np.random.default_rng(0)
    for asked in (range(info.frames), [info.frames - 1], rng.integers(0, info.frames, 9), [info.frames // 2] * 3):
        for backend in ["auto", *backends()]:
            frames = quiet_read(path, asked, backend=backend)
            assert frames.dtype == torch.uint8 and frames.shape == (len(asked), info.height, info.width, 3)
            assert numbers(frames) == list(asked), backend

@pytest.mark.parametrize("name", AWKWARD)
def test_backends_agree_bit_for_bit(folder, name):
    path = made(folder, name)
    reference = read_frames(path, lambda n: range(0, n, 3), backend="av")
    for backend in backends(): assert torch.equal(quiet_read(path, lambda n: range(0, n, 3), backend=backend), reference), backend
    with av.open(str(path)) as c:                                                    # and with decoding everything
        everything = [f.to_ndarray(format="rgb24") for f in c.decode(c.streams.best("video"))]
    assert np.array_equal(np.stack(everything[::3]), reference)

def test_best_stream_is_the_larger_one_when_neither_is_the_default(folder):
    "The container here marks its first stream as default; without the mark the larger stream wins, as it does in ffmpeg."
    data = bytearray(made(folder, "two streams.mp4").read_bytes())
    for mark in range(2):                                                            # set both tracks to enabled
        at = -1
        for _ in range(mark + 1): at = data.index(b"tkhd", at + 1)
        data[at + 4:at + 8] = struct.pack(">I", 3)
    path = folder / "two default streams.mp4"
    path.write_bytes(data)
    for backend in ["auto", *backends()]:
        frames = quiet_read(path, [0, 30, 7], backend=backend)
        assert frames.shape[1:] == (128, 192, 3) and numbers(frames) == [255, 225, 248]

class Spied:
    "A packet that tells when it is decoded."
    def __init__(self, packet, decode): self.packet, self.decode = packet, lambda: decode(packet)
    def __getattr__(self, name): return getattr(self.packet, name)

@pytest.mark.parametrize("name, codec", {"few frames h264.mp4": "libx264", "few frames mpeg4.mp4": "mpeg4"}.items())
def test_only_what_is_needed_is_decoded(folder, name, codec):
    path, decoded = write(folder / name, codec=codec, bf=0 if codec == "mpeg4" else 2,
                          options={"sc_threshold": "1000000000" if codec == "mpeg4" else "0"}), []
    with reader._opened(path) as (container, stream):
        index = reader.frame_index(path, container, stream)
        def decode(p):
            frames = p.decode()
            decoded.extend(index.pts.index(f.pts) for f in frames)
            return frames
        packets = lambda s: (Spied(p, decode) for p in container.demux(s))
        spy = SimpleNamespace(seek=container.seek, demux=packets)
        got = [f.pts for f in reader.wanted_frames(path, spy, stream, index, [14, 16, 37])]
    assert got == [index.pts[i] for i in (14, 16, 37)] and [index.pts.index(k) for k, _ in index.keys] == [0, 12, 24, 36]
    if codec == "mpeg4": assert decoded == [12, 13, 14, 15, 16, 36, 37]               # in H.264 unneeded B frames drop out
    else: assert {12, 14, 16, 36, 37} <= set(decoded) <= {*range(12, 20), 36, 37, 38, 39}

def test_rotation_is_applied(folder):
    data = bytearray(made(folder, "plain.mp4").read_bytes())
    at = data.index(b"tkhd") + 44
    assert struct.unpack(">9i", data[at:at + 36])[0] == 65536
    upright = read_frames(made(folder, "plain.mp4"), [3, 20])
    for turn, matrix in {3: (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30), 2: (-65536, 0, 0, 0, -65536, 0, 0, 0, 1 << 30)}.items():
        data[at:at + 36] = struct.pack(">9i", *matrix)
        path = folder / f"turned {turn}.mp4"
        path.write_bytes(data)
        for backend in ["auto", *backends()]:
            assert torch.equal(quiet_read(path, [3, 20], backend=backend), torch.rot90(upright, turn, (1, 2)))

def test_bytes_and_file_objects(folder):
    path = made(folder, "plain.mp4")
    reference = read_frames(path, [5, 30])
    with open(path, "rb") as f:
        for source in (str(path), path.read_bytes(), f):
            for backend in backends(): assert torch.equal(quiet_read(source, [5, 30], backend=backend), reference)
    assert read_clip(path.read_bytes(), 4).shape == (4, 64, 96, 3) and numbers(read_clip(path, 4)) == [4, 14, 24, 33]

def test_next_backend_with_one_warning(folder, monkeypatch):
    if not find_spec("decord"): pytest.skip("decord is not installed here")
    path = made(folder, "av1.mp4")
    monkeypatch.setattr(reader, "_told", set())
    with pytest.warns(UserWarning, match="decord does not read this av1 video"): first = read_frames(path, [3], backend="decord")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(read_frames(path, [3], backend="decord"), first) and numbers(first) == [3]

# --- refusals -------------------------------------------------------------------------------------------------------------------
def audio_only(path):
    with av.open(str(path), "w") as out:
        s = out.add_stream("aac", rate=16000)
        s.layout = "mono"
        for i in range(10):
            f = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
            f.sample_rate, f.pts = 16000, i * 1024
            out.mux(s.encode(f))
        out.mux(s.encode())

def zero_fps(path, source):
    "The table of frame durations says 0 for every frame."
    data = bytearray(source.read_bytes())
    at = data.index(b"stts") + 8
    for k in range(struct.unpack(">I", data[at:at + 4])[0]): data[at + 8 + 8 * k:at + 12 + 8 * k] = bytes(4)
    path.write_bytes(data)

@pytest.mark.parametrize("kind, cause", {
    "missing": "no such file", "directory": "not a file", "empty": "empty", "text": "nvalid data", "playlist": "nvalid data",
    "truncated": "nvalid data", "cut frame": "truncated", "audio only": "no video stream", "no frames": "nvalid data",
    "0 fps": "0 frames per second", "unreadable": "ermission denied"}.items())
def test_refusals_name_file_and_cause(folder, kind, cause, capfd, monkeypatch):
    path, good = folder / f"{kind}.mp4", made(folder, "plain.mp4")
    if kind == "directory": path.mkdir(exist_ok=True)
    if kind == "empty": path.touch()
    if kind == "text": path.write_text("this is no video\n" * 200)
    if kind == "playlist": path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{good}\n#EXT-X-ENDLIST\n")
    if kind == "truncated": path.write_bytes(good.read_bytes()[:len(good.read_bytes()) // 2])
    if kind == "cut frame":
        with av.open(str(good)) as c, av.open(str(path), "w", options={"movflags": "faststart"}) as out:
            s = out.add_stream_from_template(c.streams.video[0])
            for p in c.demux(c.streams.video[0]):
                if p.dts is not None:
                    p.stream = s
                    out.mux(p)
        path.write_bytes(path.read_bytes()[:-1500])
    if kind == "audio only": audio_only(path)
    if kind == "no frames":
        data = good.read_bytes()
        path.write_bytes(data[:data.index(b"moov") - 4])                              # data without the index
    if kind == "0 fps": zero_fps(path, good)
    if kind == "unreadable":
        path.write_bytes(good.read_bytes())
        path.chmod(0)
        if os.access(path, os.R_OK):                                                  # root may read every file: refuse in its name
            def refuse(*a, **k): raise PermissionError(13, "Permission denied")
            monkeypatch.setattr(av, "open", refuse)
    for read in (probe, read_clip, lambda p: read_frames(p, [0])):
        with pytest.raises(VideoReadError, match=cause) as e: read(path)
        assert path.name in str(e.value)
    assert capfd.readouterr().err == ""

def test_index_out_of_range_and_wrong_arguments(folder):
    path = made(folder, "plain.mp4")
    for bad in ([40], [-1], [0, 1000]):
        with pytest.raises(VideoReadError, match=r"plain\.mp4: frame .* is not in a video of 40 frames"): read_frames(path, bad)
    with pytest.raises(VideoReadError, match="no frame was asked for"): read_frames(path, [])
    with pytest.raises(ValueError, match="not installed"): read_frames(path, [0], backend="magic")
    with pytest.raises(VideoReadError): read_frames(b"not a video", [0])

def test_import_is_light():
    code = "import sys, vfm_lab.data.reader; print([m for m in ('av', 'decord', 'torchcodec') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert out.stdout.strip() == "[]", out.stderr

# --- samplers against hand-computed values ----------------------------------------------------------------------------------------
def seeded(k): return torch.Generator().manual_seed(k)

def test_dense_training():
    starts = set()
    for k in range(200):
        i = dense_indices(70, 16, 4, generator=seeded(k))
        assert (np.diff(i) == 4).all() and 0 <= i[0] <= 6
        starts.add(int(i[0]))
    assert starts == set(range(7))                                                   # 70 - 64 + 1 possible starts
    assert dense_indices(10, 4, 4).tolist() == [0, 4, 8, 8]                          # short: the last reachable frame repeats
    assert dense_indices(1, 4, 4).tolist() == [0, 0, 0, 0]

def test_dense_views():
    grid = [dense_indices(100, 16, 4, view=v, views=5).tolist() for v in range(5)]   # 25 strided frames, starts int(v * 9 / 4)
    assert [g[0] // 4 for g in grid] == [0, 2, 4, 6, 9] and grid[4][-1] == 96 and all(len(g) == 16 for g in grid)
    assert dense_indices(10, 4, 4, view=1, views=2).tolist() == [0, 4, 8, 8]

def test_span():
    for k in range(50):
        i = span_indices(100, 16, 4, generator=seeded(k))
        assert i[-1] - i[0] == 63 and len(i) == 16 and 0 <= i[0] < 36
    i = span_indices(65, 4, 16, generator=seeded(0))                                 # only end = 64 is possible
    assert i.tolist() == [0, 21, 42, 63]
    assert span_indices(10, 4, 4).tolist() == [0, 9, 9, 9] and span_indices(2, 4, 4).tolist() == [1, 1, 1, 1]

def test_sparse():
    assert sparse_indices(81, 8, view=0).tolist() == [5, 15, 25, 35, 45, 55, 65, 75]                     # segment 10, middle
    assert [sparse_indices(81, 8, view=c, views=4)[0] for c in range(4)] == [2, 4, 6, 8]                 # int(10 / 5 * (c + 1))
    assert sparse_indices(30, 4, view=0).tolist() == [3, 10, 17, 25]                 # 7.25 each: 0, 7, 14 (14.5 to even), 22; + int(3.625)
    drawn = np.stack([sparse_indices(81, 8, generator=seeded(k)) for k in range(300)])
    assert (drawn.min(0) == np.arange(8) * 10).all() and (drawn.max(0) == np.arange(1, 9) * 10).all()    # both ends are possible
    assert sparse_indices(1, 4).tolist() == [0] * 4 and sparse_indices(3, 4, view=0).tolist() == [0, 0, 1, 2]

def test_interval():
    assert interval_indices(40, 4, middle=True).tolist() == [4, 14, 24, 34]          # (0 + 9) // 2 …
    drawn = np.stack([interval_indices(40, 4, generator=seeded(k)) for k in range(300)])
    assert (drawn.min(0) == [0, 10, 20, 30]).all() and (drawn.max(0) == [8, 18, 28, 38]).all()   # the last of each is never drawn
    assert interval_indices(3, 5, middle=True).tolist() == [0, 1, 2, 2, 2]
    for k in range(20):                                                              # an interval of one frame: a sorted random choice
        i = interval_indices(5, 4, generator=seeded(k))
        assert (np.diff(i) > 0).all() and i[-1] < 5
    assert sorted(interval_indices(3, 5, generator=seeded(0)).tolist()) == [0, 1, 2, 2, 2]

def test_linspace():
    assert linspace_indices(80, 8).tolist() == [0, 11, 22, 33, 45, 56, 67, 79]
    assert linspace_indices(1, 3).tolist() == [0, 0, 0]

def test_samplers_stay_inside_and_repeat_with_the_seed():
    for length in [*range(1, 40), 100, 1000]:
        for sample in (dense_indices, span_indices, sparse_indices, interval_indices):
            for frames in (1, 4, 8, 16):
                i = sample(length, frames, generator=seeded(1))
                assert i.dtype == np.int64 and i.shape == (frames,) and 0 <= i.min() and i.max() < length and (np.diff(i) >= 0).all()
                assert (i == sample(length, frames, generator=seeded(1))).all()
        for v in range(5):
            assert dense_indices(length, 16, view=v).max() < length and sparse_indices(length, 8, view=v, views=5).max() < length
