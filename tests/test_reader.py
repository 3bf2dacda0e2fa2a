"""The reader on awkward files, its refusals, and the samplers against values worked out by hand.

Every frame carries its own number as a bar code, so "the right frame" is read off the picture.
"""
import os, shutil, struct, subprocess, sys, warnings
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
            s.codec_context.time_base = Fraction(1, 25 if codec == "mpeg1video" else 100)
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

# --- every frame, read alone, is that frame of a decode from start to end --------------------------------------------------------
def from_start(path) -> list:
    "Reference: PyAV from the first packet to the last, as RGB of the stream's size (no matrix is applied)."
    out = []
    with av.open(str(path)) as c:
        s = c.streams.best("video")
        s.codec_context.thread_count = 1
        size = {"width": s.codec_context.width, "height": s.codec_context.height}
        for p in c.demux(s):
            if p.size or p.dts is None: out += [f.reformat(**size, format="rgb24").to_ndarray() for f in p.decode()]
    return out

def wrong_frames(path, backend="auto") -> list[int]:
    "Numbers of frames that differ from the reference when read alone, or in a random set."
    expected, index = from_start(path), reader.open_index(path)
    assert index.info.frames == len(expected) == len(index.seconds) - 1 and (np.diff(index.seconds) > 0).all()
    rng = np.random.default_rng(0)
    asked = [[i] for i in range(len(expected))] + [rng.permutation(len(expected))[:4].tolist() for _ in range(3)]
    wrong = set()
    for numbers_ in asked:
        frames = quiet_read(path, numbers_, backend=backend, index=index).numpy()
        wrong |= {i for i, frame in zip(numbers_, frames) if not np.array_equal(frame, expected[i])}
    return sorted(wrong)

VP = {"deadline": "realtime", "cpu-used": "8"}
KINDS = {                # container: the codecs; the name of FFmpeg's muxer where the suffix does not give it
    "mp4": "libx264 libx265 mpeg4 mpeg2video mjpeg libvpx-vp9", "mov": "libx264 prores_ks", "3gp": "h263",
    "mkv": "libx264 libx265 mpeg4 mpeg1video mpeg2video mjpeg libvpx libvpx-vp9 ffv1", "webm": "libvpx libvpx-vp9",
    "avi": "libx264 mpeg4 mpeg2video mjpeg wmv2", "ts": "libx264 libx265 mpeg2video mpeg4",
    "mpg": "mpeg1video mpeg2video", "vob": "mpeg2video", "m2v": "mpeg2video", "flv": "flv libx264",
    "wmv": "wmv1 wmv2", "asf": "libx264 mpeg4", "ogv": "libvpx", "gif": "gif", "ivf": "libvpx libvpx-vp9",
    "mxf": "mpeg2video", "h264": "libx264", "hevc": "libx265",
}
OPTIONS = {"libx265": X265, "libvpx": VP, "libvpx-vp9": VP}
PIX = {"prores_ks": "yuv422p10le", "mjpeg": "yuvj420p", "gif": "rgb8"}

@pytest.mark.parametrize("kind", [f"{codec}.{c}" for c, codecs in KINDS.items() for codec in codecs.split()])
def test_every_frame_alone(folder, kind):
    codec, suffix = kind.split(".")
    path = write(folder / f"alone {kind}", frames=16, size=(128, 96), codec=codec, options=OPTIONS.get(codec), gop=6,
                 pix=PIX.get(codec, "yuv420p"), format={"m2v": "mpeg2video"}.get(suffix))
    for backend in backends(): assert wrong_frames(path, backend) == [], backend

def test_list_of_other_backends_names_containers_that_are_read():
    for pairs in reader._SAME.values():
        assert {container for container, _ in pairs} <= set(reader.CONTAINERS)
        assert not {"mpegts", "mpeg", "asf"} & {container for container, _ in pairs}          # measured: decord fails there

def test_interlaced_goes_to_pyav(folder, monkeypatch):
    path = write(folder / "fields.mp4", options={"flags": "+ildct+ilme", "x264-params": "tff=1"})
    with av.open(str(path)) as c: assert next(c.decode(video=0)).interlaced_frame
    assert wrong_frames(path, "decord" if find_spec("decord") else "av") == []

# --- clocks that begin anew -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg2video", "mpeg4"])
def test_joined_recordings(folder, codec):
    parts = [write(folder / f"part {k} {codec}.ts", frames=n, codec=codec, options=OPTIONS.get(codec), gop=8, start=start)
             for k, (n, start) in enumerate([(20, 0), (13, 0), (17, 50000), (9, 10)])]            # back, forward, back
    path = folder / f"joined {codec}.ts"
    path.write_bytes(b"".join(p.read_bytes() for p in parts))
    assert probe(path).frames == 59 and wrong_frames(path) == []
    assert numbers(read_frames(path, [0, 19, 20, 32, 33, 49, 50, 58])) == [0, 19, 0, 12, 0, 16, 0, 8]
    steps = np.diff(reader.frame_times(path))
    assert np.allclose(np.delete(steps, 32), .04) and steps[32] > 400                             # the jump forward is in the file

def test_clock_that_overflows(folder):
    "The clock of MPEG-TS has 33 bits: after 95443.7 seconds it is 0 again."
    path = write(folder / "wrap.ts", start=9544300)
    with av.open(str(path)) as c: assert -800000 < c.start_time < 0      # FFmpeg counts back from the overflow
    assert wrong_frames(path) == [] and np.allclose(reader.frame_times(path), np.arange(41) / 25)

def test_joined_with_another_size_is_not_called_truncated(folder):
    path = folder / "sizes.ts"
    path.write_bytes(write(folder / "large.ts").read_bytes() + write(folder / "small.ts", size=(64, 48)).read_bytes())
    assert numbers(read_frames(path, [0, 39, 40, 79])) == [0, 39, 0, 39]                          # brought to the first size

# --- damage in the middle -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg2video"])
def test_one_damaged_frame_in_the_middle(folder, codec):
    options = {"x265-params": "bframes=0:keyint=10:min-keyint=10:log-level=none"} if codec == "libx265" else {"sc_threshold": "0" if codec == "libx264" else "1000000000"}
    path = write(folder / f"whole {codec}.ts", codec=codec, options=options, gop=10, bf=0, size=(192, 128))
    with av.open(str(path)) as c: assert [p.is_keyframe for p in c.demux(video=0) if p.size] == ([True] + [False] * 9) * 4
    data = path.read_bytes()
    packets = [data[k:k + 188] for k in range(0, len(data), 188)]
    video = [k for k, p in enumerate(packets) if (p[1] & 31) << 8 | p[2] == 256]
    starts = [k for k in video if packets[k][1] & 64]
    hit = next(k for n, k in zip(range(15, 40), starts[15:]) if n % 10 < 8 and k + 1 in video and k + 1 not in starts) + 1
    frame = sum(k <= hit for k in starts) - 1                # lost: a piece of this frame, no B frames, so also its number
    lossy = folder / f"lossy {codec}.ts"
    lossy.write_bytes(b"".join(packets[:hit] + packets[hit + 1:]))
    index = reader.open_index(lossy)
    assert index.info.frames == 40 and index.damaged == {frame}
    with pytest.raises(VideoReadError, match=f"frame {frame} cannot be decoded"): read_frames(lossy, [frame])
    good = [i for i in range(40) if i // 10 != frame // 10 or i < frame]
    with pytest.warns(UserWarning, match=f"1 damaged frames, the first is {frame}"):
        assert torch.equal(read_frames(lossy, good), read_frames(path, good))
    assert quiet_read(lossy, [i for i in range(40) if i != frame]).shape[0] == 39

# --- turned and mirrored --------------------------------------------------------------------------------------------------------------
EIGHT = {                # (a, b, c, d): the same by NumPy; `ffmpeg -i` (autorotate) was compared with each
    (1, 0, 0, 1): lambda x: x, (-1, 0, 0, 1): lambda x: x[:, ::-1], (1, 0, 0, -1): lambda x: x[::-1],
    (-1, 0, 0, -1): lambda x: np.rot90(x, 2), (0, 1, -1, 0): lambda x: np.rot90(x, 3), (0, -1, 1, 0): np.rot90,
    (0, 1, 1, 0): lambda x: np.rot90(x)[::-1], (0, -1, -1, 0): lambda x: np.rot90(x[::-1]),
}
def with_matrix(path, source, numbers_):
    data = bytearray(source.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (round(k * 65536) for k in numbers_)
    data[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path

@pytest.mark.parametrize("matrix", EIGHT)
def test_eight_orientations(folder, matrix):
    source = made(folder, "plain.mp4")
    path = with_matrix(folder / f"matrix {matrix}.mp4", source, matrix)
    expected = np.stack([EIGHT[matrix](frame) for frame in read_frames(source, [3, 20]).numpy()])
    for backend in ["auto", *backends()]: assert np.array_equal(quiet_read(path, [3, 20], backend=backend), expected)
    assert np.array_equal(torch.stack([*reader.iter_frames(path, [3, 20])]), expected)
    if shutil.which("ffmpeg"):
        raw = subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-i", path, "-pix_fmt", "rgb24", "-sws_flags", "bilinear",
                              "-f", "rawvideo", "-"], capture_output=True).stdout
        assert np.array_equal(np.frombuffer(raw, np.uint8).reshape(40, *expected.shape[1:])[[3, 20]], expected)

@pytest.mark.parametrize("angle", [12, 45, 200])
def test_other_angles_are_refused_by_name(folder, angle):
    r = np.radians(angle)
    path = with_matrix(folder / f"{angle}.mp4", made(folder, "plain.mp4"), (np.cos(r), np.sin(r), -np.sin(r), np.cos(r)))
    for backend in backends():
        with pytest.raises(VideoReadError, match=f"{angle}.mp4: .*turned by {angle} degrees"): quiet_read(path, [0], backend=backend)

# --- rates and times ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, options, fps", [
    ("no rate.ivf", {"codec": "libvpx", "options": VP}, 25), ("no rate.ogv", {"codec": "libvpx", "options": VP}, 25),
    ("no rate.ts", {"codec": "mpeg4"}, 25), ("one.ts", {"frames": 1}, None),
    ("lapse.mp4", {"steps": lambda i: 18000 * i, "frames": 12}, 1 / 180)])
def test_streams_without_an_average_rate(folder, name, options, fps):
    path = write(folder / name, **options)
    info = probe(path)
    assert info.frames == options.get("frames", 40) and info.fps > 0 and (fps is None or abs(info.fps / fps - 1) < .12)
    assert wrong_frames(path) == []

def uneven(i): return 4 * i + 6 * max(i - 20, 0)             # hundredths of a second: 25 frames per second, then 10

@pytest.mark.parametrize("name", ["uneven.mp4", "uneven.mkv", "uneven.ts", "late uneven.mkv", "late uneven.ts"])
def test_seconds_are_those_of_the_frames(folder, name):
    path = write(folder / name, steps=uneven, start=700 if "late" in name else 0)
    seconds = reader.frame_times(path)
    assert seconds.dtype == np.float64 and seconds.shape == (41,) and seconds[0] == 0
    assert np.allclose(seconds[:40], [uneven(i) / 100 for i in range(40)], atol=1e-3)
    assert seconds[40] > seconds[39] and np.isclose(seconds[40], uneven(40) / 100, atol=1e-3 if not name.endswith("mp4") else .1)

@pytest.mark.parametrize("name", ["B frames.avi", "h264.avi", "raw.h264", "stream.ts"])
def test_seconds_without_usable_times(folder, name):
    rate = 100 if name == "raw.h264" else 25   # of the stream's own header, as ffprobe says
    assert np.allclose(reader.frame_times(made(folder, name)), np.arange(41) / rate, atol=1e-3)

# --- an index for many reads ----------------------------------------------------------------------------------------------------------
def test_index_is_made_once(folder, monkeypatch):
    path = made(folder, "plain.mp4")
    index, other = reader.open_index(path), reader.open_index(made(folder, "large first.mp4"))
    monkeypatch.setattr(reader, "_packet_table", lambda *a: pytest.fail("the packets were read again"))
    for backend in backends(): assert numbers(quiet_read(path, lambda n: [n - 1, 4], backend=backend, index=index)) == [39, 4]
    assert [numbers(f[None])[0] for f in reader.iter_frames(path, [2, 30], index=index)] == [2, 30]
    with pytest.raises(VideoReadError, match="the index is that of another video"): read_frames(path, [0], index=other)

# --- memory ---------------------------------------------------------------------------------------------------------------------------
def test_budget_is_checked_before_decoding(folder, monkeypatch):
    path = made(folder, "plain.mp4")
    size = 96 * 64 * 3
    assert read_frames(path, [1, 1, 2], max_bytes=3 * size).shape[0] == 3
    monkeypatch.setattr(reader, "_decoded", lambda *a, **k: pytest.fail("decoded"))
    with pytest.raises(VideoReadError, match=rf"plain.mp4: 3 frames of 96 × 64 take {3 * size} bytes, more than max_bytes={3 * size - 1}; read fewer"):
        read_frames(path, [1, 1, 2], max_bytes=3 * size - 1)
    with pytest.raises(VideoReadError, match="more than max_bytes=1073741824"): read_frames(path, np.zeros(1 << 16, int))

def box(name, body): return struct.pack(">I4s", 8 + len(body), name) + body

@pytest.mark.parametrize("table", ["trun", "stsz"])
def test_claims_of_an_mp4_are_checked_before_it_is_opened(folder, table, monkeypatch):
    plain = bytearray(made(folder, "plain.mp4").read_bytes())
    if table == "stsz":                                       # 80 million frames of one byte each
        at = plain.index(b"stsz")
        plain[at + 8:at + 16] = struct.pack(">II", 1, 80_000_000)
    else:
        run = box(b"tfhd", struct.pack(">5I", 0x020018, 1, 512, 1, 0)[:16]) + box(b"trun", struct.pack(">3I", 1, 80_000_000, 0))
        plain += box(b"moof", box(b"mfhd", bytes(8)) + box(b"traf", run))
    path = folder / f"{table} bomb.mp4"
    path.write_bytes(plain)
    monkeypatch.setattr(av, "open", lambda *a, **k: pytest.fail("opened"))
    for source in (path, bytes(plain)):
        with pytest.raises(VideoReadError, match="claims 800000.. frames in [0-9]+ bytes"): probe(source)

def test_number_of_packets_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(reader, "_MAX_PACKETS", 39)
    with pytest.raises(VideoReadError, match="plain.mp4: more than 39 frames"): probe(made(folder, "plain.mp4"))

@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_reading_in_a_process_with_limits(folder):
    path = made(folder, "plain.mp4")
    with open(path, "rb") as f: assert torch.equal(reader.read_isolated(f, [30, 5]), read_frames(path, [30, 5]))
    with pytest.raises(VideoReadError, match="frame 99 is not in a video of 40 frames"): reader.read_isolated(path, [99])
    with pytest.raises(VideoReadError, match="plain.mp4: not read within 0.05 seconds"): reader.read_isolated(path, [0], seconds=.05)
    with pytest.raises(VideoReadError, match="plain.mp4: "): reader.read_isolated(path, [0], max_memory=1 << 20)

# --- what is no video -------------------------------------------------------------------------------------------------------------------
COVERS = Path(__file__).parent / "faults" / "covers"          # a song with a cover; a film with a cover, twice

def test_cover_pictures():
    with pytest.raises(VideoReadError, match="song.m4a: no video stream"): probe(COVERS / "song.m4a")
    for name in ("film.mp4", "film.mkv"):
        info = probe(COVERS / name)
        assert (info.frames, info.width, info.height, info.codec) == (10, 48, 32, "h264") and wrong_frames(COVERS / name) == []

@pytest.mark.parametrize("head, what", {
    b"\x89PNG\r\n\x1a\n" + bytes(30) + b"acTL": "animated PNG", b"\x89PNG\r\n\x1a\n": "PNG picture", b"\xff\xd8\xff\xe0": "JPEG",
    b"YUV4MPEG2 W96 H64 F25:1\nFRAME\n": "Y4M", b"<!DOCTYPE html><html>404</html>": "HTML", b"PK\3\4\x14\0": "zip", b"\x7fELF\2\1": "ELF",
    b"just words, no video\n": "text", b"#EXTM3U\n#EXTINF:5,\nhttp://127.0.0.1:9/x.ts\n": "playlist", b"RIFF\0\0\0\0WAVEfmt ": "WAV",
    b"version https://git-lfs.github.com/spec/v1\n": "Git LFS"}.items(), ids=lambda x: x if isinstance(x, str) else "")
def test_other_files_are_named(tmp_path, head, what):
    path = tmp_path / "x.mp4"
    path.write_bytes(head + (b"" if head.isascii() and head[:1] != b"\x7f" and head[:1] != b"P" else bytes(500)))
    with pytest.raises(VideoReadError, match=rf"x\.mp4: .*{what}.*read here \(\.mp4 \.mkv"): probe(path)
    with pytest.raises(VideoReadError, match=what): probe(path.read_bytes())

def test_suffixes():
    assert {".mp4", ".mkv", ".webm", ".gif", ".mts", ".m2ts", ".vob", ".asf", ".ogv", ".mxf", ".ivf"} <= reader.VIDEO_SUFFIXES
    assert all(s == s.lower() and s[0] == "." for s in reader.VIDEO_SUFFIXES) and not {".m4a", ".mp3", ".png", ".txt"} & reader.VIDEO_SUFFIXES

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
