"What is asked of every system in one way: attention, input, features, rows of a head; and names."
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch.testing import assert_close

import vfm_lab
from vfm_lab.hub import Loaded, create_model, fill, list_models, load, save
from vfm_lab.inputs import InputSpec
from vfm_lab.lab import asset
from vfm_lab.models.checkpoints import CheckpointError, read_config
from vfm_lab.models.clip import tiny_clip, tiny_tokenizer
from vfm_lab.models.internvideo import VideoText
from vfm_lab.models.registry import layouts_of
from vfm_lab.models.uniformerv2 import UniFormerV2
from vfm_lab.official.umt import PretrainUMT, clip_teacher
from vfm_lab.viz.attention import attention_map, record_attention

ROOT = Path(__file__).parents[1]

SMALL = dict(image_size=32, patch=8, frames=4, dim=32, depth=3, heads=2)
MORE = {"umt_pretrain": dict(layers=2), "uniformerv2": dict(global_layers=(1, 2)), "videomae_pretrain": dict(decoder_depth=1)}


def small(name, **args):
    torch.manual_seed(0)
    more = next((v for k, v in MORE.items() if name.startswith(k)), {})
    return create_model(name, **SMALL | more | args).eval()


CLASSIFIERS = ["umt_vit_base_patch16", "videomae_vit_base_patch16", "uniformerv2_base_patch16", "uniformerv2_base_patch16_ssv2"]


@pytest.mark.parametrize("down", [False, True])
def test_attention_of_a_tower_that_halves_time(down):
    model = small("uniformerv2_base_patch16_ssv2", temporal_down=down)
    record = record_attention(model, torch.rand(3, 4, 32, 32))
    assert record.layers == 3 and attention_map(record, query=3).shape == (2 if down else 4, 4, 4)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_input_and_features_are_those_of_the_instance(name):
    model = small(name, image_size=64, num_classes=5)
    assert model.default_cfg["input_size"] == (3, 4, 64, 64) and model.input_spec.size == 64
    clip = torch.rand(2, 3, 4, 64, 64)
    with torch.no_grad():
        kept = model.forward_head(model.forward_features(clip), pre_logits=True)
        assert_close(model.head(kept), model(clip))   # features are what the head reads, after the norm


def test_a_label_map_is_never_ignored(tmp_path):
    "It chooses rows, or it is an error that names it."
    for name in CLASSIFIERS:
        model = small(name, num_classes=5)
        save(Loaded(model, name=name), tmp_path / "c.safetensors")
        found = load(tmp_path / "c.safetensors", label_map=[3, 1])
        assert_close(found.model.head.weight, model.head.weight[[3, 1]])
        other = small(name, num_classes=2)
        fill(other, tmp_path / "c.safetensors", label_map=[3, 1])
        assert_close(other.head.weight, model.head.weight[[3, 1]])
    save(Loaded(small("umt_pretrain_vit_base_patch16"), name="umt_pretrain_vit_base_patch16"), tmp_path / "p.safetensors")
    for source in (tmp_path / "p.safetensors", "tiny_clip"):
        with pytest.raises(CheckpointError, match="no head to choose rows of"):
            load(source, label_map=[0])
    with pytest.raises(CheckpointError, match="no head to choose rows of"):
        fill(small("umt_vit_base_patch16"), tmp_path / "p.safetensors", label_map=[0])
    for given in (dict(label_map=[0]), dict(layout="umt_stage1"), dict(model="umt_vit_base_patch16")):
        with pytest.raises(ValueError, match=f"{next(iter(given))} is of no use"):
            load("umt_vit_base_patch16", **given)


@pytest.mark.parametrize("front", ["", "transformer.", "backbone.transformer.", "visual.transformer."])
def test_blocks_alone_are_no_system(tmp_path, front):
    "Many files have `resblocks.`; that makes them nobody's."
    state = {f"{front}resblocks.{i}.ln_1.weight": torch.ones(32) for i in range(3)}
    torch.save(state | {"head.weight": torch.ones(3, 32)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="x.pth"):
        load(tmp_path / "x.pth")
    model = small("uniformerv2_base_patch16")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="x.pth"):
        fill(model, tmp_path / "x.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_weights_of_the_lab_have_a_name():
    by_name, by_file = load("tiny_clip"), load(asset("weights/tiny_clip.safetensors"))
    assert by_name.spec == by_file.spec == InputSpec(1, 64, "imagenet") and by_name.report.clean
    assert json.loads(by_name.tokenizer) == json.loads(asset("weights/tiny_clip_tokenizer.json").read_text())
    assert "tiny_clip" not in list_models()   # it is a file, not a kind of model
    with pytest.raises(ValueError, match="no model is named 'tiny_clap'"):
        vfm_lab.load("tiny_clap")


def test_the_cell_that_writes_tiny_clip_writes_the_whole_header(tmp_path):
    cells = json.loads((ROOT / "nbs/models/10_clip.ipynb").read_text(encoding="utf-8"))["cells"]
    code, = (text for c in cells if (text := "".join(c["source"])).startswith("REMAKE"))
    known = {"asset": lambda: tmp_path, "smoke": lambda: False, "model": tiny_clip(), "tokenizer": tiny_tokenizer(),
             "replace": replace, "save": save, "Loaded": Loaded}
    exec(code, known)
    old, new = (folder / "weights/tiny_clip.safetensors" for folder in (asset(), tmp_path))
    assert read_config(new).keys() == read_config(old).keys() and load(new).spec == load(old).spec
    for part in ("vision", "text"): assert read_config(old)[part].items() <= read_config(new)[part].items()
    assert load(new).tokenizer == (tmp_path / "weights/tiny_clip_tokenizer.json").read_text()
    assert json.loads(load(new).tokenizer) == json.loads(load(old).tokenizer)
    assert_close(load(new).model.state_dict(), load(old).model.state_dict(), atol=0, rtol=0)


def test_an_explorer_finds_its_shells():
    "In a process of its own, which has imported none of them."
    code = ("import torch; from vfm_lab.viz.explorer import MaskExplorer\n"
            "print(sorted(MaskExplorer(torch.rand(3, 4, 64, 64))._repr_mimebundle_()))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(["application/vnd.jupyter.widget-view+json", "image/png", "text/plain"]), done.stderr


TOWERS = dict(vision=dict(image_size=32, patch=8, frames=4, dim=32, depth=3, heads=2, global_layers=[1, 2]),
              text=dict(vocab=20, context=8, dim=32, depth=1, heads=2, out_dim=16))


@pytest.mark.parametrize("layers", [[1, 2], []], ids=str)
def test_video_text_keeps_every_setting(tmp_path, layers):
    parts = TOWERS | {"vision": TOWERS["vision"] | {"global_layers": layers}}
    model = VideoText(**parts, caption_weight=0.5, eps=1e-3).eval()
    save(Loaded(model), tmp_path / "towers.safetensors")
    found = load(tmp_path / "towers.safetensors").model
    assert isinstance(found, VideoText) and found.config == model.config
    assert (found.norm.eps, found.caption_weight) == (1e-3, 0.5)
    clip = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad(): assert_close(found.forward_video(clip), model.forward_video(clip))


def test_a_vit_of_timm_is_no_uniformerv2(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2,
                            global_pool="avg", fc_norm=True, num_classes=5)
    assert {"cls_token", "fc_norm.weight", "head.weight"} <= vit.state_dict().keys()
    file = tmp_path / "vit.safetensors"
    save_file(vit.state_dict(), file)
    assert layouts_of(vit.state_dict()) == layouts_of(vit.state_dict(), UniFormerV2) == []
    with pytest.raises(CheckpointError, match="vit.safetensors: no registered model has tensors of these shapes"): load(file)
    model = small("uniformerv2_base_patch16", num_classes=5)
    with pytest.raises(CheckpointError, match="does not fit UniFormerV2(.|\n)*fusion.query_token"): fill(model, file)


@pytest.mark.parametrize("classes", [0, 5])
def test_our_own_uniformerv2_is_not_taken_for_a_clip(tmp_path, classes):
    model = small("uniformerv2_base_patch16_ssv2", num_classes=classes, global_layers=(1, 2))
    save(Loaded(model, name="uniformerv2_base_patch16_ssv2"), tmp_path / "own.safetensors")
    other = small("uniformerv2_base_patch16_ssv2", num_classes=classes, global_layers=(1, 2))
    for p in other.parameters(): p.data.add_(1)
    assert fill(other, tmp_path / "own.safetensors").fresh == []
    assert_close(other.state_dict(), model.state_dict(), atol=0, rtol=0)


def test_a_teacher_that_cannot_be_downloaded_is_named(monkeypatch):
    def offline(*_, **__): raise LocalEntryNotFoundError("cannot find the requested files in the local cache\nmore")
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match="^teacher: timm cannot download 'vit_base_patch16_clip_224.openai'; give its file "
                                         r"as teacher_weights \(cannot find .* cache\)$"):
        clip_teacher(PretrainUMT())
