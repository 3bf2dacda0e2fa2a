"Weight files: foreign kinds, wrappers, hostile content, learned tables, hidden settings."

import argparse
import gzip
import io
import json
import os
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel, VideoMAEConfig
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification

from vfm_lab.models import checkpoints
from vfm_lab.models.checkpoints import CheckpointError, build_like, load_weights, peel, read_config
from vfm_lab.models.checkpoints import read_weights, rename, save_weights, unwrap
from vfm_lab.models.clip import CLIP, CLIPText, CLIPVision, tiny_clip
from vfm_lab.models.umt import UMT, UMTClassifier, UMTStudent
from vfm_lab.models.uniformerv2 import UniFormerV2
from vfm_lab.models.videomae import VideoMAE, VideoMAEClassifier
from vfm_lab.official.clip import text_from_transformers, vision_from_openai, vision_from_timm
from vfm_lab.official.clip import vision_from_transformers
from vfm_lab.official.umt import classifier_from_finetuned, classifier_from_stage1
from vfm_lab.official.uniformerv2 import FRESH, from_clip
from vfm_lab.official.videomae import FRESH as FRESH_MAE
from vfm_lab.official.videomae import classifier_from_pretrained, from_transformers
from vfm_lab.models.registry import read_label_map
from vfm_lab.golden import read_case
from vfm_lab.hub import fill, load, systems
from vfm_lab.models.registry import find_layout, head_rows
from vfm_lab.recipes import open_towers
from vfm_lab.text import word_tokenizer

TINY = dict(image_size=16, patch=8, frames=4, dim=32, depth=1, heads=2)
NAME = "videomae_vit_base_patch16"
TOWER = dict(image_size=16, patch=8, dim=32, depth=2, heads=4, out_dim=16)


systems()   # what is declared


def as_found(state):
    "Converted by the layout that fits."
    found = find_layout(state, VideoMAEClassifier)
    return found.convert(state) if found else state


def classifier(seed=0, **args):
    torch.manual_seed(seed)
    return VideoMAEClassifier(3, **TINY | dict(head_scale=1.0) | args).eval()


def clip(seed=1):
    return torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


class Named(nn.Module):
    "A model whose own keys all begin with a name."

    def __init__(self, name):
        super().__init__()
        self.add_module(name, nn.Linear(4, 3))


def says(error, *words):
    for word in words:
        assert word in str(error.value), f"{word!r} is not in {error.value}"


# ---- levels and prefixes


@pytest.mark.parametrize(
    "before",
    [
        "",
        "module.",
        "_orig_mod.",
        "model.",
        "net.",
        "module.model.",
        "model.module._orig_mod.",
        "_orig_mod.model.net.",
        "module.module.",
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_prefixes_in_any_order(tmp_path, before, suffix):
    net = classifier()
    state, file = {before + k: v for k, v in net.state_dict().items()}, tmp_path / f"a.{suffix}"
    save_file(state, file) if suffix == "safetensors" else torch.save({"state_dict": state}, file)
    other = classifier(5)
    load_weights(other, file)
    assert torch.equal(other(clip()), net(clip()))
    opened = load(file, NAME, **TINY).model
    assert torch.equal(opened(clip()), net(clip()))


@pytest.mark.parametrize("name", ["model", "net", "module", "_orig_mod"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_model_may_own_such_a_name(tmp_path, name, suffix):
    one, two, file = Named(name), Named(name), tmp_path / f"own.{suffix}"
    save_file(one.state_dict(), file) if suffix == "safetensors" else torch.save(
        one.state_dict(), file
    )
    for source in (file, one.state_dict(), peel(one.state_dict())):
        report = load_weights(two, source)
        assert len(report.loaded) == 2 and report.clean
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_a_conversion_may_want_the_prefix():
    one, two = small(), small()
    state = {f"model.encoder.{k}": v + 1 for k, v in one.state_dict().items()}
    load_weights(two, state, rename({r"model\.encoder\.": ""}))
    assert_close(two[0].weight, one[0].weight + 1)


def test_only_a_prefix_of_all_keys_goes():
    assert list(peel({"model.a": 1, "head.b": 2})) == ["model.a", "head.b"]
    head = nn.ModuleDict({"model": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    report = load_weights(
        head, {"model.weight": torch.ones(2, 2), "model.bias": torch.ones(2)}, fresh=[r"head\."]
    )
    assert report.loaded == ["model.weight", "model.bias"] and len(report.fresh) == 2


def test_average_of_weights_and_its_counter(tmp_path):
    net = small()
    average = AveragedModel(net)
    average.update_parameters(net)
    torch.save(
        {"model": {"weight": torch.zeros(1)}, "model_ema": average.state_dict()},
        tmp_path / "both.pth",
    )
    torch.save(average.state_dict(), tmp_path / "average.pth")
    assert len(load_weights(small(), tmp_path / "average.pth").loaded) == 4
    assert len(load_weights(AveragedModel(small()), average.state_dict()).loaded) == 5
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(small(), tmp_path / "both.pth")
    torch.save(
        {"model": net.state_dict(), "model_ema": average.state_dict()}, tmp_path / "both.pth"
    )
    report = load_weights(small(), tmp_path / "both.pth")
    assert "model_ema" in report.notes[0] and "note: " in str(report)


def test_an_unknown_layout_shows_its_keys(tmp_path):
    state = {f"cls.trunk.{k}": v for k, v in classifier().state_dict().items()}
    torch.save(state, tmp_path / "odd.pth")
    first = next(iter(state))
    with pytest.raises(CheckpointError) as e:
        load(tmp_path / "odd.pth")
    says(e, "odd.pth", first, "'cls.trunk.'")
    with pytest.raises(CheckpointError) as e:
        load(tmp_path / "odd.pth", NAME, **TINY)
    says(e, "odd.pth", first, "'cls.trunk.'")
    with pytest.raises(CheckpointError) as e:
        open_towers(tmp_path / "odd.pth")
    says(e, "odd.pth", first, "'cls.trunk.'")
    with pytest.raises(CheckpointError) as e:
        load_weights(classifier(), tmp_path / "odd.pth")
    says(e, "odd.pth", first, "'cls.trunk.'")
    with pytest.raises(CheckpointError) as e:
        load_weights(CLIPVision(**TOWER), tmp_path / "odd.pth", vision_from_timm)
    says(e, "odd.pth", first, "without head.weight")


# ---- what training scripts write


@pytest.mark.parametrize("new", [True, False], ids=["zip", "older"])
def test_settings_and_scores_beside_the_weights(tmp_path, new):
    net, file = small(), tmp_path / "checkpoint-9.pth"
    args = argparse.Namespace(
        lr=np.float64(1e-3),
        seed=np.int64(3),
        flag=np.bool_(True),
        model="vit",
        nested=argparse.Namespace(a=1),
    )
    torch.save(
        {
            "model": net.state_dict(),
            "args": args,
            "best": np.float32(0.5),
            "kind": np.dtype("float32"),
            "epoch": 9,
        },
        file,
        _use_new_zipfile_serialization=new,
    )
    assert len(load_weights(small(), file).loaded) == 4


def test_scores_of_numpy_1(tmp_path):
    "NumPy 1 calls its module core, NumPy 2 _core; the archive of torch holds the pickle."
    file, old = tmp_path / "new.pth", tmp_path / "old.pth"
    torch.save({"model": small().state_dict(), "best": np.float64(0.5)}, file)
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(old, "w") as made:
        for name in source.namelist():
            body = source.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in body or b"numpy.core.multiarray" in body
                body = body.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            made.writestr(name, body)
    assert len(load_weights(small(), old).loaded) == 4


def test_deepspeed_states(tmp_path):
    net, file = small(), tmp_path / "mp_rank_00_model_states.pt"
    torch.save(
        {
            "module": net.state_dict(),
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": [{"0.weight": torch.Size([3, 4])}],
            "sparse_tensor_module_names": set(),
            "global_steps": 7,
            "ds_config": {"fp16": {"enabled": False}},
            "epoch": 3,
        },
        file,
    )
    assert len(load_weights(small(), file).loaded) == 4


class Hostile:
    def __init__(self, flag, how):
        self.flag, self.how = str(flag), how

    def __reduce__(self):
        if self.how == "call":
            return os.mkdir, (self.flag,)
        if self.how == "eval":
            return eval, (f"__import__('os').mkdir({self.flag!r})",)
        if self.how == "state":
            return argparse.Namespace, (), Hostile(self.flag, "call")
        return Path.mkdir, (Path(self.flag),)


@pytest.mark.parametrize("how", ["call", "eval", "state", "attribute"])
@pytest.mark.parametrize("where", ["args", "inside", "array"])
def test_nothing_is_executed(tmp_path, how, where):
    flag = tmp_path / "ran"
    odd = Hostile(flag, how)
    if where == "inside":
        odd = argparse.Namespace(x=odd)
    if where == "array":
        odd = np.array([odd], dtype=object)
    torch.save({"model": small().state_dict(), "args": odd}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="bad.pth: refused"):
        read_weights(tmp_path / "bad.pth")
    assert not flag.exists()


def test_what_is_beside_never_comes_alive():
    "Not even argparse and NumPy are called: a stand-in takes what they would get."
    state, buffer = {"args": argparse.Namespace(a=1), "score": np.float64(2)}, io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals(checkpoints.BESIDE):
        found = torch.load(buffer, weights_only=True)
    assert all(type(v) is checkpoints._Beside and vars(v) == {} for v in found.values())


# ---- hostile and damaged content


def test_wrapped_in_itself(tmp_path):
    knot = {}
    knot["model"] = knot
    torch.save(knot, tmp_path / "knot.pth")
    with pytest.raises(CheckpointError, match="in themselves"):
        read_weights(tmp_path / "knot.pth")
    ring = {"model": {"state_dict": {}}}
    ring["model"]["state_dict"]["module"] = ring
    with pytest.raises(CheckpointError, match="in themselves"):
        unwrap(ring)
    deep = small().state_dict()
    for _ in range(4):
        deep = {"model": deep}
    assert len(unwrap(deep)) == 4
    with pytest.raises(CheckpointError, match="4 levels"):
        unwrap({"model": deep})


@pytest.mark.parametrize("key", [0, None, b"a.weight", ("a", 1), 1.5])
@pytest.mark.parametrize("wrapped", [True, False])
def test_keys_that_are_no_names(tmp_path, key, wrapped):
    state = {key: torch.zeros(2), "b": torch.zeros(1)}
    torch.save({"model": state} if wrapped else state, tmp_path / "keys.pth")
    with pytest.raises(CheckpointError, match="keys.pth: expected names"):
        load_weights(small(), tmp_path / "keys.pth")


ODD = {
    "sparse": lambda w: w.to_sparse(),
    "meta": lambda w: w.to("meta"),
    "complex": lambda w: w.to(torch.complex64),
    "bool": lambda w: w > 0,
    "int8": lambda w: w.to(torch.int8),
    "uint8": lambda w: w.abs().to(torch.uint8),
    "int64": lambda w: w.to(torch.int64),
    "nan": lambda w: w * torch.nan,
    "inf": lambda w: w / 0,
    "one nan": lambda w: w.index_fill(0, torch.tensor([1]), -torch.inf),
    "too large": lambda w: w.double() + 1e300,
    "expanded": lambda w: torch.zeros(1).expand(w.shape),
    "bf16 inf": lambda w: (w + torch.inf).bfloat16(),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_numbers_change_nothing(tmp_path, kind):
    net = small()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    state["1.weight"] = ODD[kind](state["1.weight"])
    torch.save(state, tmp_path / "odd.pth")
    for source in (tmp_path / "odd.pth", state):
        with pytest.raises(CheckpointError) as e:
            load_weights(net, source)
        says(e, "1.weight", "odd.pth" if isinstance(source, Path) else "state dict")
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()), (
            "partially filled"
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_fine(dtype):
    net, other = small(), small()
    state = {k: (v + 1).to(dtype) for k, v in net.state_dict().items()}
    load_weights(other, state)
    assert other[0].weight.dtype == torch.float32 and torch.equal(
        other[0].weight, state["0.weight"].float()
    )
    with pytest.raises(CheckpointError, match="too large for torch.float16"):
        load_weights(small().half(), {k: v + 1e6 for k, v in net.state_dict().items()})


def test_counters_may_be_whole_floats():
    norm = nn.BatchNorm1d(2)
    state = norm.state_dict() | {"num_batches_tracked": torch.tensor(7.0)}
    load_weights(norm, state)
    assert norm.num_batches_tracked == 7
    with pytest.raises(CheckpointError, match="num_batches_tracked: not whole"):
        load_weights(norm, state | {"num_batches_tracked": torch.tensor(7.5)})


def test_a_model_without_memory_is_not_filled():
    with torch.device("meta"):
        net = small()
    with pytest.raises(CheckpointError, match="meta device"):
        load_weights(net, small().state_dict())


def test_a_changed_file_changes_no_numbers(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1000)}, file)
    found = read_weights(file)
    with open(file, "r+b") as f:
        f.seek(-4000, 2)
        f.write(bytes(4000))
    assert found["a"].sum() == 1000


# ---- other files


def archives(folder, body):
    with tarfile.open(folder / "a.tar.pth", "w") as t:
        t.add(folder / "in.txt", "in.txt")
    with zipfile.ZipFile(folder / "a.zip.pth", "w") as z:
        z.write(folder / "in.txt", "in.txt")
    np.savez(open(folder / "a.npz.pth", "wb"), a=np.zeros(2))
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(folder / "script.pth"))
    (folder / "a.gz.pth").write_bytes(gzip.compress(body))


FILES = {
    "page.pth": (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
    "page.safetensors": (b"\n <html>404</html>", "a web page"),
    "denied.bin": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "a web page"),
    "lfs.safetensors": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n",
        "git lfs pull",
    ),
    "text.pth": (b"Quota exceeded\n", "text (it begins with 'Quota exceeded"),
    "json.bin": (b'{"weight_map": {}}', "JSON"),
    "empty.pth": (b"", "an empty file"),
    "empty.safetensors": (b"", "an empty file"),
    "hdf.pth": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5"),
    "noise.pth": (bytes(range(1, 40)), "no known kind"),
}


@pytest.mark.parametrize("name", FILES)
def test_foreign_files_are_named(tmp_path, name):
    body, what = FILES[name]
    (tmp_path / name).write_bytes(body)
    with pytest.raises(CheckpointError) as e:
        read_weights(tmp_path / name)
    says(e, str(tmp_path / name), what)


@pytest.mark.filterwarnings("ignore")
def test_archives_and_false_names(tmp_path):
    (tmp_path / "in.txt").write_text("x")
    torch.save(small().state_dict(), tmp_path / "ok.pth")
    save_file(small().state_dict(), tmp_path / "ok.safetensors")
    body = (tmp_path / "ok.pth").read_bytes()
    archives(tmp_path, body)
    (tmp_path / "torch.safetensors").write_bytes(body)
    (tmp_path / "safe.pth").write_bytes((tmp_path / "ok.safetensors").read_bytes())
    (tmp_path / "cut.pth").write_bytes(body[: len(body) // 2])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "ok.safetensors").read_bytes()[:40])
    wanted = {
        "a.tar.pth": "a tar archive",
        "a.zip.pth": "a zip archive",
        "a.npz.pth": "NumPy arrays",
        "script.pth": "TorchScript",
        "a.gz.pth": "a gzip archive",
        "torch.safetensors": "a torch file",
        "safe.pth": "a safetensors file",
        "cut.pth": "cut off",
        "cut.safetensors": "cut off",
    }
    for name, what in wanted.items():
        with pytest.raises(CheckpointError) as e:
            read_weights(tmp_path / name)
        says(e, name, what)


def test_an_old_torch_reads_no_pickles(tmp_path, monkeypatch):
    torch.save(small().state_dict(), tmp_path / "a.pth")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    with pytest.raises(CheckpointError, match="a.pth: torch before 2.10"):
        read_weights(tmp_path / "a.pth")


# ---- headers and sizes


def header(folder, config, state=None):
    file = folder / "h.safetensors"
    save_file(
        state or {"head.weight": torch.zeros(3, 8), "head.bias": torch.zeros(3)},
        file,
        {"config": config},
    )
    return file


@pytest.mark.parametrize("config", ["null", "[1]", "{no", "[" * 90000, '"a"', "3", '{"a": NaN}'])
def test_headers_that_are_no_config(tmp_path, config):
    file = header(tmp_path, config)
    for use in (read_config, load, open_towers):
        with pytest.raises(CheckpointError, match="h.safetensors"):
            use(file)


@pytest.mark.parametrize(
    "about",
    [
        dict(patch=0),
        dict(frames=2**30),
        dict(dim=65536, depth=64),
        dict(dim="abc"),
        dict(depth=2**30),
        dict(depth=2**19),
        dict(heads=0),
        dict(frames=2**20),
        dict(image_size=-16),
        dict(dim=[1]),
        dict(input="x"),
        dict(input={"stats": "odd"}),
        dict(input={"stride": 2**40}),
        dict(input={"sampling": 3}),
        dict(depht=2),
        dict(mlp_ratio=1e300),
    ],
)
def test_impossible_sizes_ask_for_no_memory(tmp_path, about):
    args = TINY | about
    file = header(tmp_path, json.dumps({"model": NAME} | args), classifier().state_dict())
    with pytest.raises(CheckpointError) as e:
        load(file)
    says(e, "h.safetensors")


@pytest.mark.parametrize(
    "about",
    [
        dict(vision=3, text=4),
        dict(vision={"dim": 2**40}, text={}),
        dict(vision={}, text={"vocab": "a"}),
        dict(vision={"global_layers": [0], "depth": 10**6}, text={}),
        dict(vision={}),
        dict(vision={}, text={}, input=[1]),
    ],
)
@pytest.mark.parametrize("kind", ["clip", "video"])
def test_impossible_towers(tmp_path, about, kind):
    state = {"vision.cls_token": torch.zeros(8), "text.token_embed.weight": torch.zeros(9, 8)}
    if kind == "video":
        state["vision.fusion.query"] = torch.zeros(8)
    with pytest.raises(CheckpointError, match="h.safetensors"):
        open_towers(header(tmp_path, json.dumps(about), state))


def test_build_like_gives_the_model():
    net = classifier()
    built = build_like(VideoMAEClassifier, net.config, net.state_dict())
    assert not any(p.is_meta for p in built.parameters())


def test_a_label_map_is_a_list_of_rows(tmp_path):
    for text in ("{}", "[true, 0]", "[]", "[0, 0]", "nonsense", "[-1]"):
        (tmp_path / "map.json").write_text(text)
        with pytest.raises(CheckpointError):
            read_label_map(tmp_path / "map.json")
    with pytest.raises(CheckpointError, match="head.bias is missing"):
        load_weights(classifier(), {"a": torch.ones(1)}, lambda s: head_rows(s, [0]))


# ---- position tables


def with_table(net, name, table, **more):
    return {"model": net.state_dict() | {name: table} | more}


@pytest.mark.parametrize(
    "cls, convert",
    [
        (VideoMAEClassifier, as_found),
        (UMTClassifier, classifier_from_finetuned),
        (UMTClassifier, None),
    ],
)
@pytest.mark.parametrize("shape", ["official", "flat", "half"])
def test_a_learned_table_is_used_and_kept(tmp_path, cls, convert, shape):
    torch.manual_seed(0)
    net = cls(3, **TINY, head_scale=1.0).eval()
    table = torch.randn(1, *net.pos.shape).half().float()
    stored = {"official": table, "flat": table[0], "half": table.half()}[shape]
    torch.save(with_table(net, "pos_embed", stored), tmp_path / "learned.pth")
    plain = net(clip())
    net.pos = table[0]  # official meaning: x + pos_embed
    right = net(clip())
    assert (plain - right).abs().max() > 1e-3
    other = cls(3, **TINY).eval()
    report = load_weights(other, tmp_path / "learned.pth", convert)
    assert "pos_embed" in report.notes[0] and torch.equal(other(clip()), right)
    save_weights(other, tmp_path / "own.safetensors")  # and it is not lost
    again = cls(3, **TINY).eval()
    load_weights(again, tmp_path / "own.safetensors", convert)
    assert torch.equal(again(clip()), right)


def test_a_stored_formula_is_left_out(tmp_path):
    for net in (
        classifier(),
        UMTClassifier(3, **TINY),
        UMTClassifier(3, **TINY | dict(frames=8, image_size=32)),
    ):
        torch.save(with_table(net, "pos_embed", net.pos[None].half()), tmp_path / "formula.pth")
        fresh = type(net)(**net.config)
        report = fill(fresh, tmp_path / "formula.pth")
        assert (
            report.dropped == ["pos_embed"] and not report.notes and "pos" not in fresh.state_dict()
        )
    long = VideoMAEClassifier(
        3, **TINY | dict(frames=8)
    )  # the formula of another length is a formula as well
    assert load_weights(
        classifier(), classifier().state_dict() | {"pos_embed": long.pos}
    ).dropped == ["pos_embed"]


def test_a_learned_table_of_another_size_is_refused():
    for places in (7, 9):
        with pytest.raises(CheckpointError) as e:
            load_weights(
                classifier(), classifier().state_dict() | {"pos_embed": torch.randn(1, places, 32)}
            )
        says(e, "pos_embed", f"({places}, 32)")
    with pytest.raises(CheckpointError, match="pos_embed"):
        load_weights(
            classifier(),
            classifier().state_dict() | {"pos_embed": torch.full((1, 8, 32), torch.nan)},
        )


def test_learned_tables_of_pretraining(tmp_path):
    args = TINY | dict(decoder_dim=24, decoder_depth=1, decoder_heads=2)
    torch.manual_seed(0)
    net = VideoMAE(mask_ratio=0.75, **args)
    own, decoder = torch.randn(1, 8, 32), torch.randn(1, 8, 24)
    torch.save(with_table(net, "encoder.pos_embed", own, pos_embed=decoder), tmp_path / "pre.pth")
    other = VideoMAE(mask_ratio=0.75, **args)
    load_weights(other, tmp_path / "pre.pth")
    assert torch.equal(other.encoder.pos, own[0]) and torch.equal(other.pos, decoder[0])
    save_weights(other, tmp_path / "pre.safetensors")
    for file in ("pre.pth", "pre.safetensors"):
        tuned = classifier()
        report = load_weights(tuned, tmp_path / file, classifier_from_pretrained, fresh=FRESH_MAE)
        assert torch.equal(tuned.pos, own[0]) and any(
            k.startswith("decoder.pos") for k in report.dropped
        )


def test_learned_tables_of_stage_1():
    student = UMTStudent(16, 1, **TINY)
    learned = {"encoder.pos_embed": torch.randn(1, 16, 32)}
    with pytest.raises(CheckpointError, match="encoder.pos_embed"):
        load_weights(student, student.state_dict() | learned)  # added twice
    assert load_weights(
        student, student.state_dict() | {"encoder.pos_embed": student.encoder.pos}
    ).dropped == ["encoder.pos_embed"]
    tuned = UMTClassifier(3, **TINY)
    load_weights(tuned, student.state_dict() | learned, classifier_from_stage1, fresh=FRESH_MAE)
    assert torch.equal(tuned.pos, learned["encoder.pos_embed"][0])


# ---- activations and heads


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def hub_clip(request, tmp_path_factory):
    "A random CLIP of transformers, in its folder, with what it says about an image and a text."
    torch.manual_seed(0)
    shared = dict(
        hidden_act=request.param, hidden_size=32, num_hidden_layers=2, intermediate_size=128
    )
    config = CLIPConfig(
        text_config=shared
        | dict(
            vocab_size=60,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=1,
            eos_token_id=59,
        ),
        vision_config=shared | dict(num_attention_heads=4, image_size=16, patch_size=8),
        projection_dim=16,
    )
    net, folder = CLIPModel(config).eval(), tmp_path_factory.mktemp(request.param)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    net.save_pretrained(folder)
    image, ids = torch.randn(2, 3, 16, 16), torch.tensor([[1, 5, 9, 59], [1, 7, 59, 0]])
    with torch.no_grad():
        out = net(input_ids=ids, pixel_values=image)
    return request.param, folder, image, ids, out.image_embeds, out.text_embeds


def towers(act):
    return CLIPVision(**TOWER, act=act).eval(), CLIPText(60, 12, 32, 2, 2, 16, act=act).eval()


def test_clip_computes_the_activation_of_its_file(hub_clip):
    act, folder, image, ids, image_embeds, text_embeds = hub_clip
    vision, text = towers(act)
    for net, convert in ((vision, vision_from_transformers), (text, text_from_transformers)):
        assert not load_weights(net, folder / "model.safetensors", convert).notes
    with torch.no_grad():
        assert_close(
            nn.functional.normalize(vision(image), dim=-1), image_embeds, atol=1e-5, rtol=0
        )
        assert_close(nn.functional.normalize(text(ids), dim=-1), text_embeds, atol=1e-5, rtol=0)


def test_clip_with_another_activation_is_refused(hub_clip, tmp_path):
    act, folder, *_ = hub_clip
    vision, text = towers({"gelu": "quick_gelu", "quick_gelu": "gelu"}[act])
    for net, convert in ((vision, vision_from_transformers), (text, text_from_transformers)):
        before = {k: v.clone() for k, v in net.state_dict().items()}
        with pytest.raises(CheckpointError) as e:
            load_weights(net, folder / "model.safetensors", convert)
        says(e, "model.safetensors", "config.json", f"'{act}'", "act=")
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        given = read_weights(folder / "model.safetensors")  # read first, converted by the caller
        with pytest.raises(CheckpointError, match="config.json"):
            load_weights(net, given, convert)
    if act == "gelu":
        tower = UniFormerV2(3, 16, 8, 4, 32, 2, 4, global_layers=(1,))
        with pytest.raises(CheckpointError, match="config.json"):
            load_weights(
                tower,
                folder / "model.safetensors",
                lambda s: from_clip(vision_from_transformers(s)),
                fresh=FRESH,
            )
    heads = CLIPVision(**TOWER | dict(heads=2), act=act)
    with pytest.raises(CheckpointError, match="num_attention_heads 4"):
        load_weights(heads, folder / "model.safetensors", vision_from_transformers)


def test_a_clip_config_without_the_activation_means_quick_gelu(tmp_path):
    net = CLIPVision(**TOWER, act="gelu")
    torch.save(net.state_dict(), tmp_path / "a.bin")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "clip", "vision_config": {"hidden_size": 32}})
    )
    with pytest.raises(CheckpointError, match="quick_gelu"):
        load_weights(net, tmp_path / "a.bin")
    older = {
        "model_type": "clip",
        "vision_config": {"hidden_act": "quick_gelu"},
        "vision_config_dict": {"hidden_act": "gelu"},
    }
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert load_weights(net, tmp_path / "a.bin").clean


@pytest.mark.parametrize(
    "name, about, act",
    [
        (
            "open_clip_config.json",
            {"model_cfg": {"embed_dim": 16, "quick_gelu": True}},
            "quick_gelu",
        ),
        ("open_clip_config.json", {"model_cfg": {"embed_dim": 16}}, "gelu"),
        (
            "config.json",
            {"architecture": "vit_base_patch16_clip_224", "pretrained_cfg": {"tag": "laion2b"}},
            "gelu",
        ),
        (
            "config.json",
            {"architecture": "vit_base_patch16_clip_224", "pretrained_cfg": {"tag": "openai"}},
            "quick_gelu",
        ),
        ("config.json", {"architecture": "vit_base_patch16_clip_quickgelu_224"}, "quick_gelu"),
        ("config.json", {"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_files_beside_the_weights(tmp_path, name, about, act):
    torch.save(CLIPVision(**TOWER).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / name).write_text(json.dumps(about))
    for built in ("gelu", "quick_gelu"):
        net = CLIPVision(**TOWER, act=built)
        if built == act:
            assert not load_weights(net, tmp_path / "open_clip_pytorch_model.bin").notes
        else:
            with pytest.raises(CheckpointError, match=name):
                load_weights(net, tmp_path / "open_clip_pytorch_model.bin")


@pytest.mark.parametrize(
    "about, says",
    [
        ({"vision_cfg": {"width": 128, "head_width": 16}}, "num_attention_heads 8"),
        ({"vision_cfg": {"act_kwargs": {"approximate": "tanh"}}}, "hidden_act 'gelu_tanh'"),
        ({"vision_cfg": {"width": TOWER["dim"], "head_width": TOWER["dim"] // TOWER["heads"]}}, ""),
    ],
)
def test_more_of_open_clip(tmp_path, about, says):
    net = CLIPVision(**TOWER, act="gelu")
    torch.save(net.state_dict(), tmp_path / "w.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": about}))
    if not says:
        assert load_weights(net, tmp_path / "w.bin").clean
        return
    with pytest.raises(CheckpointError, match=says):
        load_weights(net, tmp_path / "w.bin")


def test_eps_and_the_last_token_beside_the_weights(tmp_path):
    net = CLIP(CLIPVision(**TOWER), CLIPText(60, 12, 32, 2, 2, 16))
    torch.save(net.state_dict(), tmp_path / "w.bin")
    for key, good, bad in (("layer_norm_eps", 1e-5, 1e-3), ("eos_token_id", 59, 7)):
        for value in (good, bad):
            text = {"hidden_act": "quick_gelu", "vocab_size": 60, key: value}
            about = {"model_type": "clip", "text_config": text}
            (tmp_path / "config.json").write_text(json.dumps(about))
            if value == good:
                assert load_weights(net, tmp_path / "w.bin").clean
                continue
            with pytest.raises(CheckpointError, match=f"config.json says {key}"):
                load_weights(net, tmp_path / "w.bin")


def test_settings_under_the_name_of_a_level_are_no_weights(tmp_path):
    net, held = CLIPVision(**TOWER), {"model": {"name": "vit", "depth": 2}}
    torch.save(held | {"state_dict": net.state_dict()}, tmp_path / "w.pth")
    assert load_weights(net, tmp_path / "w.pth").clean
    torch.save({"model": {"module": net.state_dict()}, "ema": {"x": 1}}, tmp_path / "w.pth")
    assert load_weights(net, tmp_path / "w.pth").clean


def test_without_a_config_the_report_says_what_is_assumed(tmp_path):
    net = CLIPVision(**TOWER)
    torch.save(net.state_dict(), tmp_path / "ViT.pt")
    assert "QuickGELU is assumed" in str(load_weights(net, tmp_path / "ViT.pt", vision_from_openai))
    save_weights(net, tmp_path / "own.safetensors")
    assert not load_weights(net, tmp_path / "own.safetensors").notes
    with pytest.raises(CheckpointError, match="its header says act 'quick_gelu'"):
        load_weights(CLIPVision(**TOWER, act="gelu"), tmp_path / "own.safetensors")
    assert tiny_clip().config["vision"]["act"] == "quick_gelu"
    with pytest.raises(ValueError, match="quick_gelu, gelu"):
        CLIPVision(**TOWER, act="relu")
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match="config.json"):
        load_weights(net, tmp_path / "ViT.pt")


def test_gelu_towers_agree_with_timm():
    torch.manual_seed(0)
    source = timm.create_model(
        "vit_base_patch16_clip_224.laion2b",
        pretrained=False,
        img_size=16,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        num_classes=16,
    ).eval()
    for p in source.parameters():
        nn.init.normal_(p, std=0.3)
    nn.init.zeros_(source.head.bias)
    ours = CLIPVision(**TOWER, act="gelu").eval()
    load_weights(ours, source.state_dict(), vision_from_timm)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert_close(ours(x), source(x), atol=1e-5, rtol=1e-5)


def mae_config(**args):
    return VideoMAEConfig(
        image_size=16,
        patch_size=8,
        num_frames=4,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        decoder_hidden_size=24,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=96,
        **args,
    )


def test_videomae_of_transformers(tmp_path):
    torch.manual_seed(0)
    theirs = VideoMAEForVideoClassification(mae_config(num_labels=3)).eval()
    theirs.save_pretrained(tmp_path)
    net = load(tmp_path / "model.safetensors", NAME, **TINY).model
    with torch.no_grad():
        assert_close(net(clip()), theirs(clip().transpose(1, 2)).logits, atol=1e-5, rtol=0)
    with pytest.raises(CheckpointError, match="num_attention_heads 2"):
        load(tmp_path / "model.safetensors", NAME, **TINY | dict(heads=4))
    VideoMAEForVideoClassification(mae_config(num_labels=3, hidden_act="relu")).save_pretrained(
        tmp_path
    )
    with pytest.raises(CheckpointError, match="hidden_act 'relu'"):
        load(tmp_path / "model.safetensors", NAME, **TINY)


def test_raw_pixels_as_target_are_refused_by_name(tmp_path):
    args = TINY | dict(decoder_dim=24, decoder_depth=1, decoder_heads=2)
    for norm in (True, False):
        VideoMAEForPreTraining(
            mae_config(norm_pix_loss=norm, use_mean_pooling=False)
        ).save_pretrained(tmp_path)
        net = VideoMAE(mask_ratio=0.75, **args)
        if norm:
            assert load_weights(net, tmp_path / "model.safetensors", from_transformers).clean
        else:
            with pytest.raises(CheckpointError, match="norm_pix_loss False"):
                load_weights(net, tmp_path / "model.safetensors", from_transformers)


# ---- what a file is, where another was expected


def test_a_clip_is_opened_as_a_clip(hub_clip, tmp_path):
    _, folder, *_ = hub_clip
    assert isinstance(load(folder / "model.safetensors").model, CLIP)
    half = {"visual.class_embedding": torch.ones(2), "visual.conv1.weight": torch.ones(2, 3, 1, 1)}
    torch.save(half, tmp_path / "openai.pt")
    for use in (load, open_towers):
        with pytest.raises(CheckpointError) as e:
            use(tmp_path / "openai.pt")
        says(e, "openai.pt", "visual.conv1.weight")
    both = CLIP(CLIPVision(**TOWER), CLIPText(60, 12, 32, 2, 2, 16))
    save_weights(both, tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="brings no tokenizer"):
        open_towers(tmp_path / "clip.safetensors")


def test_towers_of_a_hugging_face_folder(hub_clip, tmp_path):
    "Its vectors are those of transformers; words lie beside the weights."
    _, folder, image, ids, image_embeds, text_embeds = hub_clip
    words = ["<pad>", "<start>", *(f"w{i}" for i in range(2, 59)), "<end>"]
    shutil.copytree(folder, tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").write_text(word_tokenizer(words).to_str())
    for place in ("hf", "hf/model.safetensors"):
        found = open_towers(tmp_path / place)
        assert (found.frames, found.size, found.stats) == (8, 16, "clip")
        assert (found.context, found.vocab) == (12, 60)
        assert_close(found.texts(["w5 w9", "w7"]), text_embeds, atol=1e-5, rtol=0)
        same = image.unsqueeze(2).expand(-1, -1, 8, -1, -1)
        assert_close(found.clips(same), image_embeds, atol=1e-5, rtol=0)
    (tmp_path / "hf/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="hf: not a tokenizer"):
        open_towers(tmp_path / "hf")


def test_towers_of_an_openai_file(tmp_path):
    "The keys of OpenAI's archive, which open_clip kept; the tokenizer is given."
    torch.manual_seed(0)
    both = CLIP(CLIPVision(16, 8, 64, 2, 1, 16), CLIPText(60, 12, 64, 2, 1, 16)).eval()
    torch.save(to_openai(both.state_dict()), tmp_path / "ViT.pt")
    (tmp_path / "words.json").write_text(word_tokenizer([f"w{i}" for i in range(60)]).to_str())
    found, ids = open_towers(tmp_path / "ViT.pt", tmp_path / "words.json"), torch.tensor([[1, 5, 59]])
    with torch.no_grad():
        want = nn.functional.normalize(both.text(ids), dim=-1)
    assert_close(found.texts(["w5"]), want, atol=1e-6, rtol=0)


def to_openai(state):
    "Ours to theirs, written down from their code."
    names = {
        r"vision\.cls_token": "visual.class_embedding",
        r"vision\.pos_embed": "visual.positional_embedding",
        r"vision\.patch_embed\.proj\.weight": "visual.conv1.weight",
        r"vision\.norm_pre": "visual.ln_pre",
        r"vision\.norm": "visual.ln_post",
        r"vision\.": "visual.",
        r"text\.token_embed": "token_embedding",
        r"text\.pos_embed": "positional_embedding",
        r"text\.norm": "ln_final",
        r"text\.proj": "text_projection",
        r"text\.": "",
        r"blocks": "transformer.resblocks",
        r"norm1": "ln_1",
        r"norm2": "ln_2",
        r"attn\.qkv\.": "attn.in_proj_",
        r"attn\.proj": "attn.out_proj",
        r"mlp\.fc1": "mlp.c_fc",
        r"mlp\.fc2": "mlp.c_proj",
    }
    made = {}
    for key, value in state.items():
        for ours, theirs in names.items():
            key = re.sub(ours, theirs, key)
        made[key] = value.squeeze(2) if key == "visual.conv1.weight" else value
    return made


# ---- masks


@pytest.mark.parametrize(
    "ratio, args, words",
    [
        (0.0, {}, ("mask_ratio 0.0 hides none of 256 tokens",)),
        (0.01, {}, ("mask_ratio 0.01 hides none of 256 tokens",)),
        (0.2, dict(image_size=16), ("0.2 hides none of 16 tokens",)),
        (1.0, {}, ("[0, 1)",)),
        (-0.1, {}, ("[0, 1)",)),
        (float("nan"), {}, ("[0, 1)",)),
        (0.02, dict(frames=2, decoder_ratio=0.75), ("leaves not one of 1 hidden tokens",)),
    ],
)
def test_masks_that_leave_nothing_to_learn(ratio, args, words):
    sizes = dict(
        image_size=64,
        patch=8,
        frames=8,
        dim=32,
        depth=1,
        heads=2,
        decoder_dim=24,
        decoder_depth=1,
        decoder_heads=2,
    )
    with pytest.raises(ValueError) as e:
        VideoMAE(mask_ratio=ratio, **sizes | args)
    says(e, *words)
    VideoMAE(mask_ratio=0.02, **sizes)  # one place of 64: little, but something


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.5, 1 - 1e-17, float("nan")])
def test_a_student_must_see_something(ratio):
    with pytest.raises(ValueError, match="2×2 places"):
        UMT(UMTStudent(16, 1, **TINY), CLIPVision(**TOWER), mask_ratio=ratio)
    UMT(UMTStudent(16, 1, **TINY), CLIPVision(**TOWER), mask_ratio=0.0)


def test_a_multimodal_file_with_something_missing_is_refused_by_name(tmp_path):
    "What its tensors do not tell, heads, a config.json beside it may say."
    golden = Path(__file__).parent / "golden/internvideo_multimodal.json"
    state, file = read_case(golden).weights, tmp_path / "mm.ckpt"
    torch.save({"state_dict": state}, file)
    with pytest.raises(CheckpointError, match="mm.ckpt"):   # narrower than a head of 64
        load(file)
    (tmp_path / "config.json").write_text('{"vision": {"heads": 4}, "text": {"heads": 4}}')
    assert load(file).model.vision.config["heads"] == 4
    lost = ["clip.visual.conv1.weight", "clip.visual_proj", "clip.text_mask_embedding",
            "clip.ln_final.weight", "caption_decoder.visual_queries",
            "caption_decoder.multimodal_layers.0.0.fn.fused_attn_ff_proj.weight"]
    for key in lost:
        assert key in state
        torch.save({k: v for k, v in state.items() if k != key}, file)
        with pytest.raises(CheckpointError, match="mm.ckpt"):
            load(file)
