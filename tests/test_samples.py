"A batch is made field by field: as before for clips, labels, seeds and captions; padded for ids and features."

import pickle
from functools import partial

import numpy as np
import pytest
import torch

from vfm_lab.data.datasets import VideoManifest, VideoShards, make_loader, write_shards
from vfm_lab.data.reader import sparse_indices
from vfm_lab.data.samples import KINDS, collate, kind_of, tokenized
from vfm_lab.data.transforms import eval_transform
from vfm_lab.lab import asset
from vfm_lab.text import word_tokenizer


def as_it_was(items):
    "What collate did before kinds had names: the yardstick for batches of clips."
    skipped = [message for item in items for message in item.get("skipped", [])]
    items = [item for item in items if "clip" in item]
    if not items:
        return {"skipped": skipped}
    many = [1 if item["clip"].ndim == 4 else len(item["clip"]) for item in items]
    batch = {"clip": torch.cat([i["clip"].view(-1, *i["clip"].shape[-4:]) for i in items])}
    for key in [k for k in items[0] if k not in ("clip", "skipped")]:
        step = int(key == "seed")
        values = [i[key] + k * step if step else i[key] for i, v in zip(items, many) for k in range(v)]
        if torch.is_tensor(values[0]):
            batch[key] = torch.stack(values)
        else:
            numbers = isinstance(values[0], (int, float))
            batch[key] = torch.tensor(values) if numbers else values
    if "skipped" in items[0]:
        batch["skipped"] = skipped
    return batch


def same(a, b):
    assert list(a) == list(b)
    for key in a:
        if not torch.is_tensor(a[key]):
            assert a[key] == b[key]
            continue
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key
    return True


def video(n, views, **rest):
    g = torch.Generator().manual_seed(n)
    shape = (3, 2, 4, 4) if views == 1 else (views, 3, 2, 4, 4)
    return {"clip": torch.rand(shape, generator=g), **rest}


@pytest.mark.parametrize("views", [1, 3])
def test_batches_of_clips_are_what_they_were(views):
    items = [
        video(n, views, label=n, path=f"{n}.mp4", share=n / 7, ok=n > 1, box=torch.ones(4) * n, pair=(n, n),
              none=None, array=np.arange(3), listed=[n], text="t", number="nine", seed=2**61 + n, skipped=["x"] * n)
        for n in range(4)
    ]
    items.insert(2, {"skipped": ["left out"]})
    batch, wanted = collate(items), as_it_was(items)
    arrays = batch.pop("array"), wanted.pop("array")
    assert all(np.array_equal(a, b) for a, b in zip(*arrays))
    assert same(batch, wanted)
    assert same(collate(items[2:3]), as_it_was(items[2:3]))
    mixed = [video(0, 1, label=0), video(1, 2, label=1)]
    assert same(collate(mixed), as_it_was(mixed))


def test_shards_and_lists_give_the_same_batches_as_before(tmp_path):
    small = dict(sampler=partial(sparse_indices, frames=2), transform=eval_transform(16))
    data = VideoManifest(asset("clips/manifest.csv"), views=2, **small).subset(range(6))
    new, old = (list(make_loader(data, 4, collate=how)) for how in (collate, as_it_was))
    assert all(same(a, b) for a, b in zip(new, old)) and len(new) == 2
    write_shards(data, tmp_path, per_shard=3)
    index = tmp_path / "index.json"
    new, old = (list(VideoShards(index, 3, views=2, seed=1, collate=how, **small)) for how in (collate, as_it_was))
    assert all(same(a, b) for a, b in zip(new, old)) and new[0]["seed"].shape == (6,)


def test_padding_by_hand():
    items = [
        {"ids": [3, 4, 5], "features": np.ones((2, 4), np.float32), "span": (1, 2.5), "query": torch.tensor([7])},
        {"ids": torch.tensor([6]), "features": torch.full((4, 4), 2.0), "span": [0, 3], "query": [8, 9]},
    ]
    batch = collate(items, {"query": partial(KINDS["ids"], pad=1)})
    assert batch["ids"].tolist() == [[3, 4, 5], [6, 0, 0]]
    assert batch["attention_mask"].tolist() == [[True] * 3, [True, False, False]]
    assert batch["query"].tolist() == [[7, 1], [8, 9]]
    assert batch["query_mask"].tolist() == [[True, False], [True, True]]
    assert batch["features"].sum((1, 2)).tolist() == [8, 32]
    assert batch["features_mask"].sum(1).tolist() == [2, 4]
    assert batch["span"].tolist() == [[1, 2.5], [0, 3]]


def test_views_repeat_what_is_padded():
    items = [video(0, 2, ids=[1, 2], features=torch.ones(3, 2), span=(0, 1)), video(1, 2, ids=[1], features=torch.ones(1, 2), span=(2, 3))]
    batch = collate(items)
    assert batch["ids"].tolist() == [[1, 2], [1, 2], [1, 0], [1, 0]]
    assert batch["features_mask"].sum(1).tolist() == [3, 3, 1, 1] and batch["span"].shape == (4, 2)


@pytest.mark.parametrize(
    "items, said",
    [
        ([{"a": 1, "name": "x.mp4"}, {"a": 1, "b": 2, "name": "y.mp4"}], "x.mp4: has no 'b'"),
        ([{"a": 1, "b": 2, "path": "x.mp4"}, {"a": 1, "path": "y.mp4"}], "y.mp4: has no 'b'"),
        ([{"box": torch.ones(2)}, {"box": torch.ones(3)}], "'box'"),
        ([{"label": 1}, {"label": None}], "'label'"),
        ([{"ids": [1.5]}], "'ids'"),
        ([{"ids": "a red star"}], "'ids'"),
        ([{"features": torch.ones(3)}, {"features": torch.ones(3)}], "kind 'tensor'"),
        ([{"features": torch.ones(2, 3)}, {"features": torch.ones(2, 4)}], "'features'"),
        ([{"span": (2, 1)}], "'span'"),
        ([{"span": (0, float("inf"))}], "'span'"),
        ([{"span": (0, 1, 2)}], "'span'"),
        ([{"ids": [1], "attention_mask": [1]}], "'attention_mask'"),
        ([video(0, 1), {"clip": torch.ones(3, 2, 4, 5)}], "'clip'"),
    ],
)
def test_what_does_not_fit_names_the_field(items, said):
    with pytest.raises(ValueError, match=said):
        collate(items)


def test_the_table_is_open():
    def boxes(name, values, views):
        return {name: len(values)}

    KINDS["boxes"] = boxes
    try:
        assert collate([{"boxes": 1}, {"boxes": 2}]) == {"boxes": 2}
    finally:
        del KINDS["boxes"]
    assert collate([{"boxes": 1}], {"boxes": boxes}) == {"boxes": 1}
    with pytest.raises(ValueError, match="no kind 'nothing'"):
        kind_of("x", 1, {"x": "nothing"})


@pytest.mark.parametrize("workers", [0, 2])
def test_sentences_become_ids_in_any_process(workers):
    words = word_tokenizer(["<pad>", "<start>", "a", "red", "star", "ring", "<end>"])
    make = partial(collate, kinds={"caption": tokenized(words)})
    make = pickle.loads(pickle.dumps(make))  # noqa: S301  as workers are sent it
    items = [{"caption": c, "number": i} for i, c in enumerate(("a red star", "a ring", "star"))]
    batch = next(iter(make_loader(items, 3, workers=workers, collate=make)))
    assert batch["ids"].tolist() == [[1, 2, 3, 4, 6], [1, 2, 5, 6, 0], [1, 4, 6, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [5, 4, 3] and batch["number"].tolist() == [0, 1, 2]
    assert batch["caption"] == ["a red star", "a ring", "star"]


def test_features_alone_pass_a_loader():
    films = [{"features": torch.randn(n, 4), "label": n} for n in (3, 1, 2)]
    loader = make_loader(films, 2)
    assert [b["features"].shape for b in loader] == [(2, 3, 4), (1, 2, 4)]
