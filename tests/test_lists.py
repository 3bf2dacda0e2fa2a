"Lists, folders and shards of other people: each clip with its label, or a line with the fault."

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
import torch

import vfm_lab.data.datasets as module
from vfm_lab.data.datasets import (
    VideoCaptions,
    VideoDataset,
    VideoFolder,
    VideoManifest,
    VideoShards,
    check_labels,
    find_videos,
    make_loader,
    read_manifest,
    write_shards,
)
from vfm_lab.data.reader import VideoReadError, sparse_indices
from vfm_lab.data.synth import save_clip, synth_clips
from vfm_lab.data.transforms import eval_transform

SMALL = dict(sampler=partial(sparse_indices, frames=2), transform=eval_transform(16))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    "The bytes of a readable video."
    path = tmp_path_factory.mktemp("clip") / "x.mp4"
    save_clip(
        path,
        synth_clips(1, frames=4, size=32, generator=torch.Generator().manual_seed(0)).frames(0),
        4,
    )
    return path.read_bytes()


def put(root, content, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def names(items):
    return [Path(item["path"]).name for item in items]


# --- finding videos ---


def test_hidden_and_odd_files_are_left_out_and_counted(tmp_path, clip, capsys):
    put(
        tmp_path,
        clip,
        "a/x.MP4",
        "a/CAM.MTS",
        "a/y.gif",
        "a/deep/z.webm",
        "b/w.mov",
        "a/._x.mp4",
        "a/.hidden.mp4",
        "a/notes.txt",
        "a/kinetics",
        "b/.ipynb_checkpoints/w-checkpoint.mp4",
        "b/__MACOSX/w.mp4",
        "__MACOSX/b/w.mp4",
        ".git/q.mp4",
        "loose.mp4",
    )
    (tmp_path / "a" / "folder.mp4").mkdir()
    (tmp_path / "a" / "nowhere.mp4").symlink_to("gone")
    os.mkfifo(tmp_path / "a" / "pipe.mp4")
    data = VideoFolder(tmp_path)
    assert data.classes == ["a", "b"] and names(data.items) == [
        "CAM.MTS",
        "z.webm",
        "x.MP4",
        "y.gif",
        "w.mov",
    ]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path) in said
    for part in ("6 hidden", "2 no file", "1 .txt", "1 without suffix", "1 outside class folders"):
        assert part in said
    found = find_videos(tmp_path)
    assert (
        len(found.videos) == 6
        and found.videos == sorted(found.videos, key=str)
        and found.left_out["hidden"] == 6
    )
    assert str(find_videos(put(tmp_path / "only", clip, "v.mkv"))) == "left out: nothing"


def test_linked_folders_are_followed_once_round(tmp_path, clip):
    store = put(tmp_path / "store", clip, "s.mp4")
    root = put(tmp_path / "v", clip, "a/x.mp4", "b/y.mp4")
    (root / "a" / "linked").symlink_to(store)
    (root / "b" / "linked").symlink_to(store)  # the same store from a second class
    (root / "a" / "loop").symlink_to(root)
    (root / "b" / "disk").symlink_to("/")
    (root / "self").symlink_to(".")  # no class of its own
    (store / "back").symlink_to(root / "a")  # found by its own name already
    data = VideoFolder(root)
    inside = [str(Path(i["path"]).relative_to(root)) for i in data.items]
    assert data.classes == ["a", "b"] and inside == [
        "a/linked/s.mp4",
        "a/x.mp4",
        "b/linked/s.mp4",
        "b/y.mp4",
    ]


def test_folders_that_link_to_each_other_are_searched_once(tmp_path, clip):
    names = [f"{n}" for n in range(9)]
    root = put(tmp_path / "v", clip, *(f"{n}/x.mp4" for n in names))
    for one in names:
        for other in names:
            if one != other: (root / one / f"to_{other}").symlink_to(root / other)
    found = find_videos(root)
    assert len(found.videos) == 9 and found.left_out["link back"] == 72


def test_a_class_keeps_its_number(tmp_path, clip):
    train = VideoFolder(
        put(tmp_path / "train", clip, *(f"{c}/1.mp4" for c in ("blue", "green", "red")))
    )
    val = VideoFolder(
        put(tmp_path / "val", clip, "red/1.mp4", "green/1.mp4"), classes=train.classes
    )
    assert [(Path(i["path"]).parent.name, i["label"]) for i in val.items] == [
        ("green", 1),
        ("red", 2),
    ]
    assert (
        val.classes == train.classes == ["blue", "green", "red"]
        and val.subset([1]).classes == train.classes
    )
    check_labels(val, 3, training=False)
    with pytest.raises(ValueError, match="val: has 2 classes .green, red., expected 3"):
        check_labels(VideoFolder(tmp_path / "val"), 3)
    put(tmp_path / "val", clip, "pink/1.mp4")
    with pytest.raises(ValueError, match="val: the class folder 'pink' is not among the 3 classes"):
        VideoFolder(tmp_path / "val", classes=train.classes)
    with pytest.raises(ValueError, match="comes twice"):
        VideoFolder(tmp_path / "train", classes=["blue", "blue", "red"])


def test_a_folder_without_classes_has_no_labels(tmp_path, clip):
    data = VideoFolder(put(tmp_path, clip, "x.mp4", "y.mp4"), **SMALL)
    assert data.classes is None and [list(i) for i in data.items] == [["path", "index"]] * 2
    assert next(iter(make_loader(data, 2)))["index"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="x.mp4: no label"):
        check_labels(data, 2)
    with pytest.raises(ValueError, match="no class folders"):
        VideoFolder(tmp_path, classes=["a"])


# --- lists ---


def listed(root, text):
    (root / "list.csv").write_text(text, encoding="utf-8")
    return root / "list.csv"


@pytest.fixture()
def here(tmp_path, clip):
    return put(tmp_path, clip, *(f"{c}.mp4" for c in "abcd"))


def test_names_as_labels(here):
    file = listed(here, "path,label\na.mp4,walk\nb.mp4,run\nc.mp4,walk\n")
    data = VideoManifest(file)
    assert data.classes == ["run", "walk"] and [i["label"] for i in data.items] == [1, 0, 1]
    assert [i["label"] for i in VideoManifest(file, classes=["walk", "jump", "run"]).items] == [
        0,
        2,
        0,
    ]
    with pytest.raises(
        ValueError, match="list.csv, line 3: the class 'run' is not among the 1 classes"
    ):
        VideoManifest(file, classes=["walk"])
    with pytest.raises(ValueError, match="list.csv: has 2 classes"):
        check_labels(data, 3)
    numbers = VideoManifest(listed(here, "a.mp4 1\nb.mp4 0"), classes=["walk", "run"])
    assert [i["label"] for i in numbers.items] == [1, 0] and numbers.classes == ["walk", "run"]
    assert VideoManifest(listed(here, "a.mp4 1\nb.mp4 0")).classes is None


@pytest.mark.parametrize(
    "label", ["9" * 30, "9" * 5000, "1.0", "nan", "inf", "1e5", "--1", "+1", "\u00b2", "0x1", "''"]
)
def test_labels_that_are_no_class_numbers(here, label):
    with pytest.raises(
        ValueError, match=r"list.csv, line 2: the label .* is not a whole number"
    ) as e:
        VideoManifest(listed(here, f"a.mp4,0\nb.mp4,{label}\n"))
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_labels_outside_of_the_classes(here, capsys):
    with pytest.raises(ValueError, match=r"list.csv, line 1: label -1, classes are 0 to 3$"):
        check_labels(VideoManifest(listed(here, "a.mp4 -1\nb.mp4 0")), 4)
    with pytest.raises(ValueError, match=r"my list, line 4: label 4, classes are 0 to 3$"):
        check_labels(VideoManifest(listed(here, "path,label\na.mp4,0\n\nb.mp4,4")), 4, "my list")
    gaps = VideoManifest(listed(here, "a.mp4 0\nb.mp4 1\nc.mp4 3"))
    check_labels(gaps, 4)
    assert capsys.readouterr().err.endswith("list.csv: no clip of 1 of the 4 classes: 2\n")
    check_labels(gaps, 4, training=False)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match=r"line 3: label 3"):
        check_labels(gaps.subset([2, 0]), 3)  # places survive a subset
    for wrong in (0.5, float("nan"), True, 2**70, "1"):
        with pytest.raises(ValueError, match="items, x: the label .* is not a whole number"):
            check_labels([{"path": "x", "label": wrong}], 4)


def test_odd_lines(here, clip):
    put(here, clip, "u\u2028x.mp4", "with\x0cfeed.mp4", 'quote"d.mp4')
    (here / "folder").mkdir()
    assert names(
        read_manifest(
            listed(here, 'path,label\nu\u2028x.mp4,0\nwith\x0cfeed.mp4,1\nquote"d.mp4,2\n')
        )
    ) == ["u\u2028x.mp4", "with\x0cfeed.mp4", 'quote"d.mp4']
    for text, says in [
        (f'path,label\n"{"x" * 200000}",0\n', "line 2: expected a path and a label"),
        ("a.mp4,0\n./a.mp4,1", "line 2: .*came already in line 1"),
        (f"a.mp4,0\n{here}/a.mp4,1", "line 2: .*came already in line 1"),
        ("folder 0", "line 1: no file"),
        ("a\0.mp4,0", "line 1: no file"),
        ("no/such/a.mp4,0", "line 1: no file"),
    ]:
        with pytest.raises(ValueError, match=says) as e:
            read_manifest(listed(here, text))
        assert "\n" not in str(e.value) and len(str(e.value)) < 600
    with pytest.raises(ValueError, match="separator is one character"):
        read_manifest(listed(here, "a.mp4 0"), sep="::")
    for text in ("[" * 100000, "[" + "9" * 5000 + "]", "[NaN]"):
        with pytest.raises(ValueError, match="list.csv: not JSON"):
            VideoCaptions(listed(here, text))


def test_items_are_a_sequence(here):
    items = read_manifest(listed(here, "a.mp4 1\nb.mp4 0\nc.mp4 1"))
    assert (
        items[0] == {"path": str(here / "a.mp4"), "label": 1}
        and items[-1] == list(items)[2]
        and items[1:] == list(items)[1:]
    )
    assert (
        items == list(items)
        and items + [{"path": "z"}] == [*items, {"path": "z"}]
        and pickle.loads(pickle.dumps(items)) == items  # noqa: S301
    )
    with pytest.raises(IndexError):
        items[3]


def test_bytes_per_row(tmp_path, monkeypatch):
    "A list of dicts takes about 350 bytes a row, and each worker process copies what it touches."
    rows = 20_000
    (tmp_path / "list.csv").write_text(
        "path,label\n"
        + "".join(f"class_{i % 400}/video_{i:08}.mp4,{i % 400}\n" for i in range(rows))
    )
    monkeypatch.setattr(
        module,
        "_files",
        lambda folder: (
            f"video_{i:08}.mp4" for i in range(int(folder.rpartition("_")[2]), rows, 400)
        ),
    )
    tracemalloc.start()
    data = VideoManifest(tmp_path / "list.csv")
    now, high = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert now < 100 * rows and high < 500 * rows and len(pickle.dumps(data.items)) < 100 * rows
    assert data.items[19_999] == {
        "path": str(tmp_path / "class_399/video_00019999.mp4"),
        "label": 399,
        "index": 19_999,
    }


def test_each_folder_is_listed_once(tmp_path, clip, monkeypatch):
    put(tmp_path, clip, *(f"{c}/{i}.mp4" for c in "ab" for i in range(50)))
    file = listed(tmp_path, "".join(f"{c}/{i}.mp4 0\n" for i in range(50) for c in "ab"))
    listings, looks, scan, stat = [], [], os.scandir, os.stat
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", lambda folder: listings.append(str(folder)) or scan(folder))
        patch.setattr(os, "stat", lambda *a, **k: looks.append(a) or stat(*a, **k))
        assert len(read_manifest(file)) == 100
    assert sorted(listings) == [str(tmp_path / c) for c in "ab"] and len(looks) < 5


def test_fingerprint(tmp_path, here, clip):
    def mark(text, root=here):
        return VideoManifest(listed(root, text)).fingerprint()

    first = mark("a.mp4 0\nb.mp4 1")
    assert (
        first == mark("path,label\n./a.mp4,0\nb.mp4,1") and len(first) == 64
    )  # another way to write the same list
    assert (
        len(
            {
                first,
                mark("b.mp4 1\na.mp4 0"),
                mark("a.mp4 0"),
                mark("a.mp4 0\nb.mp4 0"),
                mark("a.mp4 0\nc.mp4 1"),
            }
        )
        == 5
    )
    assert first == mark("a.mp4 0\nb.mp4 1", put(tmp_path / "moved", clip, "a.mp4", "b.mp4"))
    (here / "b.mp4").write_bytes(clip + b"more")
    assert first != mark("a.mp4 0\nb.mp4 1")
    plain = [{"path": str(here / f"{c}.mp4"), "label": 0} for c in "ab"]
    assert VideoDataset(plain).fingerprint() != VideoDataset(plain[::-1]).fingerprint()


# --- loaders ---


def test_spawned_workers_load_the_same(here):
    data = VideoManifest(
        listed(here, "a.mp4 0\nb.mp4 1\nc.mp4 2\nd.mp4 3"), on_error="skip", **SMALL
    )
    loader = make_loader(data, 2, shuffle=True, workers=2, seed=4)
    loader.multiprocessing_context = "spawn"
    here_, there = list(make_loader(data, 2, shuffle=True, seed=4)), list(loader)
    assert [b["index"].tolist() for b in here_] == [b["index"].tolist() for b in there]
    assert all(torch.equal(a["clip"], b["clip"]) for a, b in zip(here_, there, strict=True))


STOPPED = """
import os, signal
from vfm_lab.data.datasets import make_loader
class Stops:
    def __len__(self): return 4
    def __getitem__(self, i): os.kill(os.getpid(), signal.SIGSTOP)
try: list(make_loader(Stops(), 2, workers=1, timeout=2))
except TimeoutError as e: print(e)
"""


def test_a_stopped_worker_is_not_waited_for():
    "In a process of its own, for it is the end of the process that would wait as well."
    done = subprocess.run(
        [sys.executable, "-c", STOPPED], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.startswith("no batch came for 2 seconds"), (
        done.stderr[-2000:]
    )
    assert (
        make_loader(range(4), 2).timeout == 0 and make_loader(range(4), 2, workers=1).timeout == 600
    )


@pytest.mark.parametrize("kind", [ValueError, VideoReadError])
def test_an_error_of_a_worker_is_one_line(kind):
    class Fails(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            raise kind("list.csv, line 3: ValueError: no")

    for workers in (0, 1):
        with pytest.raises(kind) as e:
            list(make_loader(Fails(), 2, workers=workers))
        assert str(e.value) == "list.csv, line 3: ValueError: no"


# --- shards ---


@pytest.fixture()
def shards(tmp_path, clip):
    "Four shards of four clips."
    root = put(tmp_path / "videos", clip, *(f"{i:02}.mp4" for i in range(16)))
    file = listed(root, "".join(f"{i:02}.mp4 {i % 4}\n" for i in range(16)))
    return write_shards(
        VideoManifest(file, classes=list("wxyz")), tmp_path / "a::b? {c,d} [1-2]", per_shard=4
    )


def numbers(batches):
    return [i for b in batches for i in b["index"].tolist()]


def pack(path, entries):
    with tarfile.open(path, "w") as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def about(i, **more):
    return json.dumps({"index": i, "label": 0, "name": f"{i}.mp4"} | more).encode()


def index_of(folder, **counts):
    (folder / "index.json").write_text(json.dumps({f"{name}.tar": n for name, n in counts.items()}))
    return folder / "index.json"


def test_good_shards_in_an_odd_folder(shards):
    loader = VideoShards(shards, 4, num_classes=4, **SMALL)
    assert sorted(numbers(loader)) == list(range(16)) and loader.classes == list("wxyz")
    assert sorted(p.name for p in shards.parent.iterdir()) == [
        *(f"0000{i}.tar" for i in range(4)),
        "classes.json",
        "index.json",
    ]
    mark = loader.fingerprint()
    (shards.parent / "00001.tar").write_bytes(
        (shards.parent / "00001.tar").read_bytes() + b"\0" * 512
    )
    assert VideoShards(shards, 4, **SMALL).fingerprint() != mark


@pytest.mark.parametrize(
    "name",
    ["clip_a", "x.json", "x._y", "a.b.c.mp4", "under_score.MOV", "caf\u00e9.MP4", "x.tar.gz", "x."],
)
def test_names_of_all_kinds_can_be_packed(tmp_path, clip, name):
    data = VideoDataset([{"path": str(put(tmp_path, clip, name) / name), "label": 3, "index": 0}])
    (batch,) = VideoShards(write_shards(data, tmp_path / "s"), 1, **SMALL)
    assert batch["name"] == [name] and batch["label"].tolist() == [3]


def test_foreign_stems_with_dots(tmp_path, clip):
    pack(
        tmp_path / "a.tar",
        [
            (f"./d/clip.v{i}{end}", body)
            for i in range(3)
            for end, body in (
                (".MP4", clip),
                (".json", about(i)),
                (".pkl", b"x"),
                ("/._x.mp4", b"mac"),
            )
        ],
    )
    assert sorted(numbers(VideoShards(index_of(tmp_path, a=3), 3, **SMALL))) == [0, 1, 2]


def cut(path, clips):
    "Leave the first clips of a shard whole and the next one without its end."
    with tarfile.open(path) as tar:
        place = tar.getmembers()[2 * clips].offset_data
    path.write_bytes(path.read_bytes()[: place + 100])


def clipped(path, clips):
    "Leave the first clips of a shard, cut exactly behind the last."
    with tarfile.open(path) as tar:
        place = tar.getmembers()[2 * clips].offset
    path.write_bytes(path.read_bytes()[:place])


def header(path, clips):
    with tarfile.open(path) as tar:
        place = tar.getmembers()[2 * clips].offset
    whole = bytearray(path.read_bytes())
    whole[place : place + 200] = b"\xff" * 200
    path.write_bytes(whole)


@pytest.mark.parametrize(
    "fault, says",
    [
        (partial(cut, clips=2), r"00001.tar: cut off after 2 of 4 clips"),
        (partial(clipped, clips=3), r"00001.tar: cut off after 3 of 4 clips"),
        (partial(header, clips=1), r"00001.tar: cut off after 1 of 4 clips"),
        (lambda p: p.write_bytes(b""), r"00001.tar: cut off after 0 of 4"),
        (lambda p: p.write_bytes(b"no tar" * 500), r"00001.tar: cut off after 0 of 4"),
        (lambda p: p.unlink(), r"no file .*00001.tar"),
        (lambda p: (p.unlink(), os.mkfifo(p)), r"no file .*00001.tar"),
    ],
)
def test_a_damaged_shard(shards, fault, says):
    workers = 2 if getattr(fault, "func", None) is cut else 0
    fault(shards.parent / "00001.tar")
    with pytest.raises((ValueError, VideoReadError), match=says) as e:
        list(VideoShards(shards, 2, workers=workers, **SMALL))
    assert "\n" not in str(e.value)
    for world in (1, 2):  # as many whole batches for each process as without the damage
        loader = VideoShards(shards, 2, workers=workers // world, on_error="skip", **SMALL)
        shares = [list(loader.fixed_order(1, rank, world)(0)) for rank in range(world)]
        assert [[len(b["clip"]) for b in share] for share in shares] == [[2 // world] * 8] * world
        messages = [m for share in shares for b in share for m in b["skipped"]]
        assert messages and all("00001.tar: " in m for m in messages)
        later = list(loader.fixed_order(1, 0, world)(0, 5))
        assert all(
            torch.equal(a["clip"], b["clip"]) and a["index"].tolist() == b["index"].tolist()
            for a, b in zip(shares[0][5:], later, strict=True)
        )


@pytest.mark.parametrize(
    "counted, says",
    [
        (3, "more than the 3 clips of index.json"),
        (5, "cut off after 4 of 5 clips"),
        (2**31 - 1, "cut off after 4 of 2147483647"),
    ],
)
def test_a_miscounted_shard(shards, counted, says):
    (shards).write_text(json.dumps({"00000.tar": 4, "00001.tar": counted}))
    with pytest.raises(VideoReadError, match=f"00001.tar: {says}"):
        list(VideoShards(shards, 2, **SMALL))
    if counted > 1000:
        return
    batches = list(VideoShards(shards, 1, on_error="skip", **SMALL))
    assert len(batches) == 4 + counted and set(numbers(batches)) >= set(range(7))


def test_nothing_to_read_ends_under_skip(shards):
    for path in shards.parent.glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(VideoReadError, match="cut off after 0 of 4"):
        list(VideoShards(shards, 2, on_error="skip", **SMALL))
    (shards).write_text(json.dumps({"00000.tar": 2**31 - 1}))
    with pytest.raises(
        VideoReadError, match="cut off after 0 of 2147483647 clips .*no other shard"
    ):
        list(VideoShards(shards, 2, on_error="skip", **SMALL))


def test_bad_clips_in_a_shard(tmp_path, clip):
    "The first ones as well: the next good clip stands in for them."
    good = {i: [(f"{i}.mp4", clip), (f"{i}.json", about(i))] for i in range(8)}
    bad = {
        0: [("0.mp4", clip[:300]), ("0.json", about(0))],
        1: [("1.mp4", clip)],
        4: [("4.json", about(4))],
        6: [("6.mp4", clip), ("6.json", b"[")],
    }
    pack(tmp_path / "a.tar", [entry for i in range(8) for entry in {**good, **bad}[i]])
    index = index_of(tmp_path, a=8)
    loader = VideoShards(index, 2, shuffle=0, on_error="skip", **SMALL)
    batches = list(loader.fixed_order(0)(0))
    assert numbers(batches) == [2, 2, 2, 3, 3, 5, 5, 7]
    assert numbers(loader.fixed_order(0)(0, 2)) == [3, 5, 5, 7] and numbers(
        loader.fixed_order(0)(0, 3)
    ) == [5, 7]
    messages = [m for b in batches for m in b["skipped"]]
    assert [m.rpartition("a.tar, ")[2][:1] for m in messages] == list("0146")
    with pytest.raises(VideoReadError, match="a.tar, 0.mp4"):
        list(VideoShards(index, 2, shuffle=0, **SMALL))
    pack(
        tmp_path / "b.tar",
        [entry for i in range(30) for entry in ((f"{i}.mp4", b"no"), (f"{i}.json", about(i)))],
    )
    with pytest.raises(VideoReadError, match="10 clips in a row"):
        list(VideoShards(index_of(tmp_path, b=30), 2, on_error="skip", **SMALL))


@pytest.mark.parametrize(
    "label, says",
    [
        (-1, "label -1, classes are 0 to 3"),
        (4, "label 4, classes"),
        (0.5, "not a whole"),
        ("1", "not a whole"),
        (10**30, "not a whole"),
        (True, "not a whole"),
        (None, "no label"),
    ],
)
def test_labels_in_shards(tmp_path, clip, label, says):
    pack(
        tmp_path / "a.tar",
        [("0.mp4", clip), ("0.json", about(0)), ("1.mp4", clip), ("1.json", about(1, label=label))],
    )
    loader = VideoShards(
        index_of(tmp_path, a=2), 2, num_classes=4, workers=int(label == 4), on_error="skip", **SMALL
    )
    for look in (list, VideoShards.check_labels):   # as it is reached, and before a training
        with pytest.raises(ValueError, match=f"a.tar, 1.mp4: .*{says}") as e:
            look(loader)
        assert "\n" not in str(e.value)


def test_labels_of_good_and_damaged_shards_are_read_without_their_videos(shards):
    loader = VideoShards(shards, 2, num_classes=10**6, **SMALL)
    loader.check_labels()
    for tar in shards.parent.glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:-3000])
    loader.check_labels()   # a damaged one is told when it is reached


@pytest.mark.parametrize(
    "text, says",
    [
        ("[]", "JSON object"),
        ("null", "JSON object"),
        ("{}", "no shards"),
        ('{"a.tar": -1}', "-1 clips"),
        ('{"a.tar": "4"}', "'4' clips"),
        ('{"a.tar": true}', "True clips"),
        ('{"a.tar": 1.5}', "1.5 clips"),
        ('{"a.tar": 99999999999999}', "clips"),
        ("[" * 100000, "not JSON"),
        ('{"a.tar": ' + "9" * 5000 + "}", "not JSON"),
        ('{"a.tar": NaN}', "not JSON"),
        ("", "not JSON"),
        ('{"": 1}', "clips"),
    ],
)
def test_a_wrong_index(tmp_path, text, says):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=f"index.json.*{says}") as e:
        VideoShards(tmp_path / "index.json", 1)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="cannot be read"):
        VideoShards(tmp_path / "gone.json", 1)


def test_no_process_is_started(shards, tmp_path, monkeypatch):
    "A path is a path, and of addresses only some kinds are taken."
    started = []
    monkeypatch.setattr(
        subprocess.Popen,
        "__init__",
        lambda self, *a, **k: started.append(a) or (_ for _ in ()).throw(OSError("no")),
    )
    monkeypatch.setattr(os, "system", started.append)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pipe:touch PWNED #"
    shards.parent.rename(folder)
    assert len(numbers(VideoShards("pipe:touch PWNED #/index.json", 4, **SMALL))) == 16
    assert (
        len(numbers(VideoShards(folder / "index.json", 4, root="pipe:touch PWNED #", **SMALL)))
        == 16
    )
    (folder / "index.json").write_text(json.dumps({"pipe:touch PWNED; cat 00000.tar": 4}))
    with pytest.raises(ValueError, match="no file"):
        VideoShards(folder / "index.json", 4, **SMALL)
    with pytest.raises(VideoReadError):
        list(VideoShards(folder / "index.json", 4, on_error="skip", **SMALL))
    for root in (
        "pipe:touch OTHER #",
        "PIPE:x",
        "file:///x/",
        "htgs://x",
        "hf://x",
        "ais://x",
        "ftp://x/",
        "data:x",
    ):
        with pytest.raises(ValueError, match=f"not from '{root.partition(':')[0]}'"):
            VideoShards(folder / "index.json", 4, root=root, **SMALL)
    write_shards(VideoManifest(tmp_path / "videos" / "list.csv"), "pipe:cat > PWNED #")
    assert (
        not started
        and not (tmp_path / "PWNED").exists()
        and (tmp_path / "pipe:cat > PWNED #" / "index.json").exists()
    )


def test_shards_from_an_address(shards, monkeypatch):
    "webdataset opens it; what cannot be opened is named, and no shell sees the name."
    from importlib import import_module

    asked = []

    def gopen(url, mode):
        asked.append(url)
        return open(
            shards.parent / url.rpartition("/")[2].replace("%7B", "{").replace("%7D", "}"), mode
        )

    monkeypatch.setattr(import_module("webdataset.gopen"), "gopen", gopen)
    assert (
        len(numbers(VideoShards(shards, 4, root="https://host/set", **SMALL))) == 16
        and "https://host/set/00000.tar" in asked
    )
    shards.write_text(json.dumps({"{a,b}.tar": 4}))
    with pytest.raises(VideoReadError, match=r"https://host/set/\{a,b\}.tar: "):
        list(VideoShards(shards, 4, root="https://host/set/", **SMALL))
    assert asked[-1] == "https://host/set/%7Ba%2Cb%7D.tar"


def test_a_kill_while_writing_leaves_no_index(tmp_path, clip, monkeypatch):
    data = VideoManifest(listed(put(tmp_path, clip, "a.mp4", "b.mp4"), "a.mp4 0\nb.mp4 1"))
    index = write_shards(data, tmp_path / "s", per_shard=1)
    os.unlink(tmp_path / "b.mp4")
    with pytest.raises(ValueError, match="b.mp4: cannot be read"):
        write_shards(data, tmp_path / "s", per_shard=1)
    assert not index.exists() and sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "00000.tar",
        "00001.tar",
    ]


def test_the_rival_of_the_benchmark_does_the_same_work(here, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from manifest import by_dicts

    file = listed(here, "path,label\na.mp4,1\nb.mp4,0\n")
    assert by_dicts(file) == list(VideoManifest(file).items)
    for text in ("path,label\na.mp4,1\na.mp4,1\n", "path,label\na.mp4,1\ngone.mp4,1\n"):
        for read in (by_dicts, VideoManifest):
            with pytest.raises(ValueError):
                read(listed(here, text))


def test_a_test_leaves_out_what_cannot_be_read(tmp_path, clip, capsys):
    "Another clip in its place would be counted twice."
    put(tmp_path, clip, "a.mp4", "b.mp4", "c.mp4")
    for name in ("bad.mp4", "worse.mp4"):
        (tmp_path / name).write_bytes(b"nothing")
    lines = ["a.mp4,0", "bad.mp4,1", "b.mp4,2", "c.mp4,3", "worse.mp4,4"]
    (tmp_path / "l.csv").write_text("\n".join(lines))
    videos = VideoManifest(tmp_path / "l.csv", on_error="drop", views=2, **SMALL)
    batches = list(make_loader(videos, 2))
    assert [b["label"].tolist() for b in batches[:2]] == [[0, 0], [2, 2, 3, 3]]
    assert "clip" not in batches[2] and "worse.mp4" in batches[2]["skipped"][0]
    said = capsys.readouterr().err
    assert "bad.mp4" in said and "worse.mp4" in said and said.startswith("2 ×")
    with pytest.raises(ValueError, match="on_error is 'raise' or 'skip', not 'drop'"):
        VideoShards(index_of(tmp_path, a=1), 2, on_error="drop", **SMALL)


def test_what_one_clip_of_a_batch_lacks_is_named(tmp_path, clip):
    pack(
        tmp_path / "a.tar",
        [("0.mp4", clip), ("0.json", about(0, mood=1)), ("1.mp4", clip), ("1.json", about(1))],
    )
    with pytest.raises(ValueError, match="1.mp4: has no 'mood'"):
        list(VideoShards(index_of(tmp_path, a=2), 2, shuffle=0, **SMALL))


def test_a_list_of_files_that_may_be_missing(tmp_path, clip):
    put(tmp_path, clip, "a.mp4")
    (tmp_path / "l.csv").write_text("a.mp4,0\nb.mp4,0\n")
    with pytest.raises(ValueError, match="no file .*b.mp4"):
        read_manifest(tmp_path / "l.csv")
    assert names(read_manifest(tmp_path / "l.csv", missing=True)) == ["a.mp4", "b.mp4"]
