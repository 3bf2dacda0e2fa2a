"Manifests, loaders and augmentation: what must hold for every clip list and any number of workers."
import json
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from vfm_lab.data.datasets import (VideoCaptions, VideoDataset, VideoFolder, VideoManifest, make_loader, read_manifest,
                                   skip_report, view_indices)
from vfm_lab.data.reader import VideoReadError, linspace_indices, sparse_indices
from vfm_lab.data.samples import collate
from vfm_lab.data.synth import SynthDataset, save_clip, synth_clips
from vfm_lab.inputs import STATS
from vfm_lab.data.transforms import (CROPS, crop_resize, denormalize, eval_transform, mixup, multi_scale_box, normalize,
                                     rand_augment, random_erase, random_flip, resize_short, to_clip, train_transform)

POLICY = "rand-m7-n4-mstd0.5-inc1"
FULL = train_transform(32, crop="resized", rand_augment=POLICY, erase=.5)


def gen(seed=0): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    "Eight readable videos of different sizes, one of them in a folder with a space in its name."
    root = tmp_path_factory.mktemp("clips")
    (root / "a class").mkdir()
    batch = synth_clips(8, frames=12, size=48, generator=gen(1))
    for i in range(8):
        frames = batch.frames(i)[:, :, :40] if i % 2 else batch.frames(i)
        save_clip(root / ("a class" if i == 7 else "") / f"v{i}.mp4", frames, 12)
    return root


@pytest.fixture()
def spoiled(clips, tmp_path):
    "The readable videos, one cut off and one that is text."
    (tmp_path / "cut.mp4").write_bytes((clips / "v0.mp4").read_bytes()[:700])
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    paths = [clips / f"v{i}.mp4" for i in range(7)] + [tmp_path / "cut.mp4", tmp_path / "text.mp4"]
    return [{"path": str(p), "label": i, "index": i} for i, p in enumerate(paths)]


def items(clips): return [{"path": str(clips / f"v{i}.mp4"), "label": i, "index": i} for i in range(7)]


# --- transforms ---

@pytest.fixture()
def still():
    "A clip of equal frames: whatever makes them unequal was drawn per frame."
    return torch.randint(0, 256, (1, 40, 60, 3), generator=gen(), dtype=torch.uint8).expand(6, -1, -1, -1)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("policy", [None, POLICY, "rand-m9-n2-mstd0.5"])
def test_one_draw_per_clip(still, crop, policy):
    for seed in range(15):
        clip = train_transform(32, crop=crop, rand_augment=policy)(still, generator=gen(seed))
        assert clip.shape == (3, 6, 32, 32) and (clip == clip[:, :1]).all()


def test_erased_box_is_the_same_in_every_frame_and_its_noise_is_not(still):
    clip = normalize(to_clip(still))
    hit = (random_erase(clip, 1., generator=gen(2)) != clip).all(0)
    assert hit.any() and (hit == hit[:1]).all()
    noise = random_erase(clip, 1., generator=gen(2))[:, :, hit[0]]
    assert (noise[:, 0] != noise[:, 1]).any()


def test_generator_decides_and_global_generators_are_left_alone(still):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first, again, other = (FULL(still, generator=gen(s)) for s in (3, 3, 4))
    mixup(torch.rand(4, 3, 2, 8, 8, generator=gen()), torch.arange(4), 4, generator=gen())
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_without_a_generator_torch_decides(still):
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(FULL(still))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_multi_scale_box_follows_its_rule():
    h, w = 240, 320
    shapes = {multi_scale_box(h, w, 224, generator=gen(s))[2:] for s in range(600)}
    sides = [240, 210, 180, 158]
    assert shapes == {(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1}
    for s in range(200):
        top, left, bh, bw = multi_scale_box(20, 33, 224, generator=gen(s))
        assert 0 <= top <= 20 - bh and 0 <= left <= 33 - bw


def test_crop_at_native_size_keeps_every_byte(still):
    assert torch.equal(crop_resize(still, (3, 5, 20, 30), (20, 30)), still[:, 3:23, 5:35])
    assert resize_short(still, 20).shape == (6, 20, 30, 3) and resize_short(still.transpose(1, 2), 20).shape == (6, 30, 20, 3)


@pytest.mark.parametrize("stats", STATS)
def test_statistics(stats, still):
    clip = to_clip(still)
    torch.testing.assert_close(denormalize(normalize(clip, stats), stats), clip)
    mean, std = STATS[stats]
    torch.testing.assert_close(normalize(clip, stats)[1], (clip[1] - mean[1]) / std[1])
    with pytest.raises(ValueError, match="choose one of"): normalize(clip, "imgnet")


@pytest.mark.parametrize("wrong", [torch.zeros(4, 8, 8, 3), torch.zeros(3, 4, 8, 8).byte(), torch.zeros(8, 8, 3).byte()])
def test_to_clip_refuses(wrong):
    with pytest.raises(ValueError, match="expected uint8 frames"): to_clip(wrong)


def test_flip_and_eval(still):
    kinds = [random_flip(still, generator=gen(s)) for s in range(20)]
    assert all(torch.equal(k, still) or torch.equal(k, still.flip(2)) for k in kinds)
    assert len({k[0, 0, 0, 0].item() for k in kinds}) == 2
    assert torch.equal(eval_transform(32)(still), eval_transform(32, crops=3)(still)[1])
    assert eval_transform(32, crops=3)(torch.stack([still, still])).shape == (6, 3, 6, 32, 32)
    assert rand_augment(still, generator=gen()).shape == still.shape


@pytest.mark.parametrize("how", [dict(cutmix=0), dict(alpha=0), {}])
def test_mixup_target_says_what_is_in_the_clip(how):
    clip = torch.zeros(4, 3, 5, 40, 40)
    clip[:2] = 1  # ones are paired with zeros
    x, y = mixup(clip, torch.tensor([0, 0, 1, 1]), 2, smoothing=0, generator=gen(3), **how)
    torch.testing.assert_close(x.mean((1, 2, 3, 4)), y[:, 0])
    assert (x == x[:, :1, :1]).all() and clip[:2].min() == 1
    with pytest.raises(ValueError, match="even"): mixup(clip[:3], torch.zeros(3).long(), 2)


# --- lists of clips ---

@pytest.mark.parametrize("text, sep", [
    ("v0.mp4 3\na class/v7.mp4 1", None), ("v0.mp4 12 3\na class/v7.mp4 12 1", None), ("v0.mp4;12;3\na class/v7.mp4;12;1\n", None),
    ("v0.mp4,3\r\n\r\na class/v7.mp4, 1\r\n", None), ('"v0.mp4",3\n"a class/v7.mp4",1', None), ("v0.mp4\t3\na class/v7.mp4\t1", None),
    ("\ufeffname,label,path\nx,3,v0.mp4\ny,1,a class/v7.mp4", None), ("v0.mp4|3\na class/v7.mp4|1", "|")])
def test_good_manifests(clips, tmp_path, text, sep):
    file = tmp_path / "list.txt"
    file.write_text(text, encoding="utf-8")
    assert read_manifest(file, clips, sep) == [{"path": str(clips / p), "label": n} for p, n in (("v0.mp4", 3), ("a class/v7.mp4", 1))]


def test_relative_paths_start_at_the_manifest(clips, tmp_path):
    (clips / "here.txt").write_text("v0.mp4 0")
    assert len(VideoManifest(clips / "here.txt")) == 1
    (tmp_path / "absolute.txt").write_text(f"{clips}/v0.mp4 0")
    assert len(VideoManifest(tmp_path / "absolute.txt", root="/nowhere")) == 1
    (tmp_path / "there.txt").write_text("v0.mp4 0")
    with pytest.raises(ValueError, match="line 1.*looked up from `root`"): VideoManifest(tmp_path / "there.txt")


@pytest.mark.parametrize("text, says", [
    ("", "empty"), ("\n \n", "empty"), ("path,label\n", "no clip"), ("v0.mp4 0\nv9.mp4 1", "line 2: no file"), ("v0.mp4", "line 1"),
    ("v0.mp4 0\nv1.mp4", "line 2: expected a path and a label"), ("v0.mp4,0\nv1.mp4,1,2", "line 2: expected a path and a label"), ("v0.mp4,0\n,1", "line 2"),
    ("v0.mp4 0\nv1.mp4 cat", "line 2: the label 'cat'"),
    ("v0.mp4 0.5", "line 1: the label '0.5'"), ("v0.mp4 0\nv1.mp4 1\nv0.mp4 0", "line 3.*line 1")])
def test_bad_manifests_name_file_and_line(clips, tmp_path, text, says):
    file = tmp_path / "list.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"list.txt.*{says}"): VideoManifest(file, clips)


def test_manifest_that_is_no_text(clips, tmp_path):
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x81\x82")
    with pytest.raises(ValueError, match="b.csv: cannot be read as text"): VideoManifest(tmp_path / "b.csv")
    with pytest.raises(ValueError, match="gone.csv"): VideoManifest(tmp_path / "gone.csv")


def test_captions(clips, tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps([{"video": "v0.mp4", "caption": ["one", "two"], "more": 1}, {"video": "v1.mp4", "caption": "three"},
                                {"video": "v0.mp4", "caption": "four"}]))
    data = VideoCaptions(file, clips, transform=eval_transform(32))
    assert [(i["caption"], i["index"]) for i in data.items] == [("one", 0), ("two", 0), ("three", 1), ("four", 0)]
    batch = next(iter(make_loader(data, 4)))
    assert batch["clip"].shape == (4, 3, 8, 32, 32) and batch["caption"][3] == "four" and batch["index"].tolist() == [0, 0, 1, 0]
    for text, says in [("[]", "expected a list"), ("{}", "expected a list"), ("[1]", "entry 1"), ("[", "not JSON"), ("", "empty"),
                       ('[{"video": "v0.mp4", "caption": []}]', "entry 1"), ('[{"video": "v0.mp4", "caption": " "}]', "entry 1"),
                       ('[{"video": "v0.mp4", "caption": "a"}, {"video": "v0.mp4", "caption": "a"}]', "entry 2.*entry 1"),
                       ('[{"video": "no.mp4", "caption": "a"}]', "entry 1: no file")]:
        file.write_text(text)
        with pytest.raises(ValueError, match=f"c.json.*{says}"): VideoCaptions(file, clips)


def test_folder(clips, tmp_path):
    for name in ("b", "a", ".hidden"): (tmp_path / name / "deep").mkdir(parents=True)
    for i, place in enumerate(("b", "b/deep", "a")): (tmp_path / place / "x.MP4").symlink_to(clips / f"v{i}.mp4")
    (tmp_path / "a" / "notes.txt").write_text("not a clip")
    data = VideoFolder(tmp_path, transform=eval_transform(32))
    assert data.classes == ["a", "b"] and [i["label"] for i in data.items] == [0, 1, 1] and data[0]["clip"].shape == (3, 8, 32, 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no video"): VideoFolder(tmp_path)
    with pytest.raises(ValueError, match="no class folders"): VideoFolder(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such folder"): VideoFolder(tmp_path / "gone")


# --- loaders ---

def epoch(loader): return [(b["clip"], b["path"]) for b in loader]


def same(a, b): return len(a) == len(b) and all(torch.equal(x[0], y[0]) and x[1] == y[1] for x, y in zip(a, b))


def test_batches_do_not_depend_on_the_number_of_workers(spoiled):
    data = VideoDataset(spoiled, transform=FULL, views=2, on_error="skip")
    runs = []
    for workers in (0, 2):
        torch.manual_seed(workers)  # the global generator has no say
        loader = make_loader(data, 4, shuffle=True, workers=workers, seed=3)
        runs.append([epoch(loader) for _ in range(3)])
    assert all(same(a, b) for a, b in zip(*runs))
    assert not same(runs[0][0], runs[0][1]) and not same(runs[0][0], epoch(make_loader(data, 4, shuffle=True, seed=4)))
    assert [len(c) for c, _ in runs[0][0]] == [8, 8, 2]
    later = make_loader(data, 4, shuffle=True, seed=3)
    later.sampler.set_epoch(2)
    assert same(epoch(later), runs[0][2])


def test_the_loop_can_resume_from_any_epoch(clips):
    from vfm_lab.train.resume import fixed_order
    loader = make_loader(VideoDataset(items(clips), transform=FULL), 3, shuffle=True)
    batches = fixed_order(loader, seed=7)
    whole = [[b["clip"] for b in batches(e)] for e in range(3)]
    again = [b["clip"] for b in fixed_order(loader, seed=7)(2, start=1)]
    assert len(again) == 2 and all(torch.equal(a, b) for a, b in zip(whole[2][1:], again))


def test_skipped_clips_are_replaced_counted_and_named(spoiled, capsys):
    loader = make_loader(VideoDataset(spoiled, transform=eval_transform(32), on_error="skip"), 3)
    batches = list(loader)
    assert [len(b["clip"]) for b in batches] == [3, 3, 3]
    assert not {"cut.mp4", "text.mp4"} & {p.rsplit("/")[-1] for b in batches for p in b["path"]}
    said = capsys.readouterr().err
    assert len(loader.skipped) >= 2 and "cut.mp4" in said and "text.mp4" in said and said.strip() == skip_report(loader.skipped)
    for b in batches: assert b["label"].tolist() == b["index"].tolist()  # what replaces a clip brings its own label
    list(make_loader(VideoDataset(spoiled[:3], transform=eval_transform(32), on_error="skip"), 3))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("workers", [0, 1])
def test_raise_names_the_file(spoiled, workers):
    loader = make_loader(VideoDataset(spoiled, transform=eval_transform(32)), 3, workers=workers)
    with pytest.raises(VideoReadError, match="cut.mp4"): list(loader)


def test_nothing_readable_ends(spoiled):
    with pytest.raises(VideoReadError, match="10 clips in a row"): VideoDataset(spoiled[-2:], on_error="skip")[0]


def test_every_process_gets_the_same_number_of_full_batches(spoiled):
    from accelerate.data_loader import prepare_data_loader
    data = VideoDataset(spoiled, transform=eval_transform(32), on_error="skip")
    counts = []
    for rank in range(2):
        loader = make_loader(data, 2, shuffle=True, drop_last=True)
        shard = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False, rng_types=[])
        counts.append([len(b["clip"]) for b in shard])
    assert counts[0] == counts[1] and set(counts[0]) == {2}


def test_samplers_and_transforms_of_every_kind(clips):
    data = VideoDataset(items(clips), sampler=partial(sparse_indices, frames=4), transform=FULL)
    assert data[0]["clip"].shape == (3, 4, 32, 32)
    assert VideoDataset(items(clips), sampler=linspace_indices, transform=to_clip)[0]["clip"].shape == (3, 8, 48, 48)
    test = VideoDataset(items(clips), sampler=partial(view_indices, frames=4, views=2), transform=eval_transform(32, crops=3))
    batch = next(iter(make_loader(test, 2)))
    assert batch["clip"].shape == (2 * 2 * 3, 3, 4, 32, 32) and batch["index"].tolist() == [0] * 6 + [1] * 6
    first, last = sparse_indices(12, 4, view=0, views=2), sparse_indices(12, 4, view=1, views=2)
    assert view_indices(12, 4, 2).tolist() == [first.tolist(), last.tolist()]


def test_views_are_decoded_once_and_differ(clips, monkeypatch):
    import vfm_lab.data.datasets as module
    calls, read = [], module.read_frames
    monkeypatch.setattr(module, "read_frames", lambda *a: calls.append(a) or read(*a))
    clip = VideoDataset(items(clips), transform=FULL, views=3)[0]["clip"]
    assert len(calls) == 1 and clip.shape == (3, 3, 8, 32, 32) and not torch.equal(clip[0], clip[1])


def test_subset_other_datasets_and_refusals(clips):
    data = VideoDataset(items(clips), transform=eval_transform(32))
    assert [i["index"] for i in data.subset([4, 2]).items] == [4, 2] and len(data) == 7
    with pytest.raises(ValueError, match="subset"): make_loader(Subset(data, [0]), 1)
    with pytest.raises(ValueError, match="do not fill"): make_loader(data, 8, drop_last=True)
    for wrong in (dict(views=0), dict(on_error="ignore")):
        with pytest.raises(ValueError): VideoDataset(items(clips), **wrong)
    with pytest.raises(ValueError, match="at least one"): VideoDataset([])
    batch = next(iter(make_loader(SynthDataset(6, frames=4, size=32), 6, shuffle=True)))
    assert batch["clip"].shape == (6, 3, 4, 32, 32) and batch["mask"].shape[0] == 6 and len(batch["name"]) == 6
    assert collate([data[0]])["clip"].shape == (1, 3, 8, 32, 32)


def test_a_dataset_can_be_sent_to_a_spawned_worker(clips):
    data = pickle.loads(pickle.dumps(VideoDataset(items(clips), transform=FULL, on_error="skip")))  # noqa: S301
    torch.testing.assert_close(data[0, 1]["clip"], VideoDataset(items(clips), transform=FULL)[0, 1]["clip"])
