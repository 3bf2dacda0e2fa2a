"""Windows over long videos: which frames are decoded, how often, and when they are shown; files of features and files that are none."""
import warnings
from fractions import Fraction
import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from vfm_lab.data import reader
from vfm_lab.data.reader import VideoReadError, read_frames
from vfm_lab.tasks import features
from vfm_lab.tasks.features import extract_features, load_features, save_features, window_starts, windows

def write(path, frames=60, codec="libx264", times=lambda i: 4 * i, gop=10, size=(64, 48)):
    "A video whose frame i has the brightness 4 i; times in hundredths of a second."
    with av.open(str(path), "w") as out:
        s = out.add_stream(codec, rate=25, options={"bf": "0", "sc_threshold": "0"})
        s.width, s.height, s.pix_fmt, s.codec_context.gop_size = *size, "yuv420p", gop
        s.codec_context.time_base = Fraction(1, 100)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 4 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = times(i), Fraction(1, 100)
            out.mux(s.encode(frame))
        out.mux(s.encode())
    return path

def brightness(clip):                      # (B, 3, T, H, W) in [0, 1] → (B, T)
    return clip.mean((1, 3, 4))

@pytest.fixture
def spies(monkeypatch):
    "What happens: index passes, decoded frames, frames turned into RGB."
    seen = {"index": 0, "decoded": 0, "rgb": 0}
    table, decoded, matrix = reader._packet_table, reader._decoded, reader._matrix
    def index(*a):
        seen["index"] += 1
        return table(*a)
    def decode(*a, **k):
        for frame in decoded(*a, **k):
            seen["decoded"] += 1
            yield frame
    def turned(frame):
        seen["rgb"] += 1
        return matrix(frame)
    for name, spy in (("_packet_table", index), ("_decoded", decode), ("_matrix", turned)): monkeypatch.setattr(reader, name, spy)
    return seen

@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.mpg", "mpeg2video"), ("joined.ts", "libx264")])
@pytest.mark.parametrize("window, stride, frames", [(8, 2, None), (8, 2, 3), (4, 4, None), (4, 20, None), (16, 5, 4), (80, 1, None)])
def test_windows_are_the_frames_of_the_video(tmp_path, name, codec, window, stride, frames):
    path = write(tmp_path / name, codec=codec)
    if name == "joined.ts": path.write_bytes(path.read_bytes() * 2)
    n = reader.probe(path).frames
    picked = np.linspace(0, window - 1, frames or window).round().astype(int)
    starts = window_starts(n, window, stride)
    got = [*windows(path, starts, picked)]
    every = read_frames(path, range(n))
    assert len(got) == len(starts)
    for start, one in zip(starts, got): assert torch.equal(one, every[np.minimum(start + picked, n - 1)])

@pytest.mark.parametrize("options, used, decoded", [
    ({"window": 8, "stride": 2}, 60, 60),                    # each frame once, though in four windows
    ({"window": 8, "stride": 2, "frames": 2}, 54, 60),       # first and last of 27 windows: even numbers to 52, odd ones from 7
    ({"window": 4, "stride": 20}, 12, 12),                   # 3 windows, each at a key frame: nothing between them
    ({"window": 1, "stride": 25}, 3, 7)])                    # frames 0, 25, 50: decoded are 0, 20 … 25 and 50, less what nobody refers to
def test_only_used_frames_are_decoded_and_converted(tmp_path, spies, options, used, decoded):
    path = write(tmp_path / "a.mp4")
    found = extract_features(brightness, path, size=16, preprocess="detection", batch=2, **options)
    assert spies["index"] == 1 and spies["rgb"] == used and used <= spies["decoded"] <= decoded + 4
    first = found["frames"][:, 0]
    assert torch.allclose(found["features"][:, 0] * 255, 4.0 * first, atol=3)

def test_memory_is_that_of_a_window_not_of_the_stride(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", frames=60)
    asked = []
    monkeypatch.setattr(features, "check_size", lambda source, count, info: asked.append(count))
    for window, stride in ((4, 20), (4, 4), (8, 2)): [*windows(path, window_starts(60, window, stride), range(window))]
    assert asked == [4, 4, 8]
    monkeypatch.undo()
    monkeypatch.setattr(features, "check_size", lambda s, c, info: reader.check_size(s, c, info, 64 * 48 * 3 * 7))
    with pytest.raises(VideoReadError, match="a.mp4: 8 frames of 64 × 48 take 73728 bytes"): extract_features(brightness, path, window=8, size=16)

@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_seconds_are_the_times_of_the_frames(tmp_path, name):
    def times(i): return 300 + 4 * i + 6 * max(i - 30, 0)    # from frame 30 on ten frames per second
    path = write(tmp_path / name, times=times)
    found = extract_features(brightness, path, window=4, stride=6, size=16)
    first, last = found["frames"].T.tolist()
    expected = [[(times(a) - 300) / 100, (times(b + 1) - 300) / 100] for a, b in zip(first, last)]
    assert torch.allclose(found["seconds"], torch.tensor(expected), atol=2e-3)
    short = extract_features(brightness, path, window=100, size=16)
    assert short["frames"].tolist() == [[0, 59]] and short["seconds"][0, 1] > (times(59) - 300) / 100

def test_nan_is_refused_by_the_name_of_the_video(tmp_path):
    path = write(tmp_path / "a.mp4", frames=8)
    with pytest.raises(ValueError, match=r"a\.mp4: features: 2 of 2 numbers are NaN"):
        extract_features(lambda clip: torch.full((len(clip), 2), float("nan")), path, window=8, size=16)
    one = {"features": torch.full((1, 2), float("inf")), "seconds": torch.zeros(1, 2), "frames": torch.zeros(1, 2, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"b\.mp4: features: 2 of 2"): save_features({"b.mp4": one}, tmp_path / "f.npz", {})
    assert not [*tmp_path.glob("*f.npz*")]

# --- files ------------------------------------------------------------------------------------------------------------------------
ONE = {"features": torch.rand(3, 5), "seconds": torch.rand(3, 2), "frames": torch.arange(6).view(3, 2)}

@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_what_is_saved_is_loaded(tmp_path, suffix):
    path = tmp_path / f"f{suffix}"
    for settings in ({"window": 8}, {"window": 16}):          # the second replaces the first
        save_features({"a/b c.mp4": ONE, "ü.mp4": ONE}, path, settings)
        found, back = load_features(path)
        assert back == settings and set(found) == {"a/b c.mp4", "ü.mp4"}
        for one in found.values(): assert {k: v.tolist() for k, v in one.items()} == {k: v.tolist() for k, v in ONE.items()}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    path.write_bytes(bytes(path.stat().st_size))              # the tensors are copies, not views on the file
    assert torch.equal(found["ü.mp4"]["features"], ONE["features"])
    with pytest.raises(ValueError, match="f.pkl: features are written to"): save_features({}, tmp_path / "f.pkl", {})

def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f.safetensors"
    save_features({"a.mp4": ONE}, path, {})
    before = path.read_bytes()
    def fail(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr(features, "save_file", fail)
    with pytest.raises(OSError): save_features({"b.mp4": ONE}, path, {})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]

def flat(name="a.mp4", **changes):
    one = {**{k: v.clone() for k, v in ONE.items()}, **changes}
    return {f"{name}/{k}": v for k, v in one.items() if v is not None}

FOREIGN = {
    "weights": ({"blocks.0.weight": torch.rand(2, 2)}, {"settings": "{}"}), "no settings": (flat(), {"format": "pt"}),
    "bad settings": (flat(), {"settings": "{"}), "list": (flat(), {"settings": "[1]"}), "deep": (flat(), {"settings": "[" * 100_000}),
    "NaN settings": (flat(), {"settings": '{"window": NaN}'}), "no seconds": (flat(seconds=None), {"settings": "{}"}),
    "too few seconds": (flat(seconds=torch.rand(2, 2)), {"settings": "{}"}), "flat features": (flat(features=torch.rand(3)), {"settings": "{}"}),
    "NaN": (flat(features=torch.full((3, 5), float("nan"))), {"settings": "{}"}), "more": (flat(extra=torch.rand(3)), {"settings": "{}"}),
}

@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_one_error_that_names_it(tmp_path, name):
    tensors, about = FOREIGN[name]
    save_file(tensors, tmp_path / "f.safetensors", about)
    np.savez(tmp_path / "f.npz", **{k: v.numpy() for k, v in tensors.items()}, **{k: np.array(v) for k, v in about.items()})
    for suffix in (".safetensors", ".npz"):
        with pytest.raises(ValueError, match=rf"f\{suffix}: ") as e: load_features(tmp_path / f"f{suffix}")
        assert type(e.value) is ValueError and "\n" not in str(e.value)

@pytest.mark.parametrize("content", [b"", b"hello", b"PK\3\4", bytes(100), b"\x80\4]\x94.", None])
def test_a_file_of_another_format_is_one_error(tmp_path, content):
    for suffix in (".safetensors", ".npz", ".txt"):
        path = tmp_path / f"f{suffix}"
        if content is not None: path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"f\{suffix}: "), warnings.catch_warnings():
            warnings.simplefilter("error")
            load_features(path)
