"The command line: recipes, runs on several processes, shards, features; all in processes of their own, as a user starts them."
import csv, json, os, shutil, socket, subprocess, sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator, tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_reference_values import fill, noise, official_multimodal, official_uniformerv2
from torch.testing import assert_close

from vfm_lab import cli, recipes
from vfm_lab.config import RECIPES, Data, recipe_file
from vfm_lab.data.datasets import VideoManifest, VideoShards, write_shards
from vfm_lab.data.reader import VideoReadError
from vfm_lab.data.synth import COLORS
from vfm_lab.data.transforms import eval_transform
from vfm_lab.lab import asset
from vfm_lab.hub import Loaded, create_model, fill as fill_from, load, save, systems
from vfm_lab.inputs import InputSpec
from vfm_lab.models.checkpoints import read_config, save_weights
from vfm_lab.models.internvideo import caption_words
from vfm_lab.official.internvideo import tiny_video_text
from vfm_lab.tasks import recognition
from vfm_lab.official.umt import PretrainUMT
from vfm_lab.official.videomae import PretrainVideoMAE
from vfm_lab.tasks.classify import classify
from vfm_lab.tasks.features import extract_features, load_features
from vfm_lab.tasks.finetune import evaluate as measure
from vfm_lab.tasks.retrieval import Towers, search as find, video_index, zero_shot
from vfm_lab.text import word_tokenizer
from vfm_lab.train import loop
from vfm_lab.train.loop import sharded
from vfm_lab.train.resume import checkpoints

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "recipes").glob("*.yaml"))
ENV = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", COLUMNS="160")


def shards(test):
    "Torch 2.6 cannot shard on a CPU; `fit` then says so, which is tested in its place (test_a_torch_that_cannot_shard_says_so)."
    return test if hasattr(torch.cpu.Stream, "record_event") else None


def save_towers(towers, file):
    "Weights that say how they are fed and have their words."
    spec = InputSpec(towers.frames, towers.size, towers.stats)
    save(Loaded(towers.model, spec, tokenizer=towers.tokenizer.to_str()), file)


def kind_of(file):
    "The recipe class, from the command that stands in the file."
    text = file.read_text()
    return next(kind for command, kind in RECIPES.items() if f"vfm_lab {command} --config" in text)


def command(*args, processes=0):
    "Run `vfm_lab` on several processes with accelerate launch, or on one of its own."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes, "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_ip", "127.0.0.1", "--main_process_port", port] if processes else []
    words = [sys.executable, *launch, "-m", "vfm_lab.cli", *args]
    done = subprocess.run([str(w) for w in words], env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr


def leave(monkeypatch, *words):
    "The same in this process, and what it leaves with: 0, 1, or the message of a mistake."
    monkeypatch.setattr(sys, "argv", ["vfm_lab", *map(str, words)])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught: cli.main()
    return caught.value.code


def run(monkeypatch, *words):
    "The same, where it must go well."
    code = leave(monkeypatch, *words)
    assert not code, code


def pooled(net): return lambda clip: net.forward_head(net.forward_features(clip), pre_logits=True)


systems()   # fills the table of recipes


def history(folder): return json.loads((Path(folder) / "history.json").read_text())


# the files

@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_recipe(file, tmp_path):
    "It is read, its model exists with these arguments, its comment states the rate that the optimizer gets, and it survives a round trip."
    kind, text = kind_of(file), file.read_text()
    recipe = recipes.read_recipe(file, kind)
    with torch.device("meta"): model = timm.create_model(recipe.model, **recipe.model_args, **({"num_classes": recipe.classes} if kind is recipes.Finetune else {}))
    wanted = getattr(model, "encoder", model).input_spec
    assert (wanted.frames, wanted.size) == (recipe.data.frames, recipe.data.size) and ("tiny" in file.stem or recipe.data.stats == wanted.stats)
    config = recipes.train_config(recipe, 100)
    stated = [float(line.rpartition("=")[2].split()[0]) for line in text.splitlines() if line.startswith("#") and "/ 256 =" in line]
    assert abs(config.lr / stated[0] - 1) < 0.005 and (len(stated) == 1 or abs(config.min_lr / stated[1] - 1) < 0.005)
    recipes.write_recipe(recipe, tmp_path / "config.yaml")
    assert recipes.read_recipe(tmp_path / "config.yaml", kind) == recipe


def test_every_run_has_its_file():
    assert len([f for f in FILES if "tiny" not in f.stem]) == 50
    sizes = {"umt_b16_stage1": 88.01, "umt_l16_stage1": 307.81}   # millions, encoder and heads
    for stem, wanted in sizes.items():
        recipe = recipes.read_recipe(ROOT / f"recipes/{stem}.yaml", PretrainUMT)
        with torch.device("meta"): model = timm.create_model(recipe.model, **recipe.model_args)
        assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - wanted) < 0.01
    frozen = recipes.read_recipe(ROOT / "recipes/uniformerv2_l14_336_frozen_k400.yaml", recipes.Finetune)
    with torch.device("meta"): model = frozen.build(create_model)
    assert abs(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6 - 50.9) < 0.1


BAD = {"schedule: {epoch: 3}": "unknown key 'schedule.epoch'", "sead: 1": "unknown key 'sead'", "data: {frames: 8.5}": "data.frames: must be a whole number",
       "machine: {shard: 1}": "machine.shard: must be a boolean", "schedule: {betas: [1]}": "schedule.betas", "- 1": "must be keys and values",
       "a: [": "not YAML", "out: !!python/object/apply:os.system ['x']": "not YAML", "loss: l3": "'l2', 'mse' or 'smooth_l1'"}


@pytest.mark.parametrize("text", BAD)
def test_what_is_wrong_is_named(text, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match="r.yaml") as caught: recipes.read_recipe(tmp_path / "r.yaml", PretrainUMT)
    assert BAD[text] in str(caught.value)


def test_only_safe_yaml():
    source = (ROOT / "vfm_lab/config.py").read_text()
    assert source.count("yaml.load(text, _loader())") == source.count("yaml.load(") == 1
    assert "class Loader(yaml.SafeLoader)" in source and "unsafe" not in source


def test_options_win_over_the_file():
    recipe = cli.parse(recipes.Finetune, [f"--config={ROOT}/recipes/finetune_tiny.yaml", "--schedule.base-lr", "1e-3", "--data.no-flip", "--seed", "3"], "x")
    assert (recipe.schedule.base_lr, recipe.data.flip, recipe.seed, recipe.classes) == (1e-3, False, 3, 8)
    with pytest.raises(ValueError, match="name of a file"): cli.parse(recipes.Finetune, ["--config"], "x")


# the command

@pytest.mark.parametrize("words", [(), ("pretrain",), ("pretrain", "umt"), ("finetune",), ("eval",), ("features",), ("classify",), ("search",)], ids=" ".join)
def test_help(words, monkeypatch, capsys):
    run(monkeypatch, *words, "--help")
    assert "usage" in capsys.readouterr().out


def test_help_is_quick():
    done = subprocess.run([sys.executable, "-c", "import sys, vfm_lab, vfm_lab.cli; print('torch' in sys.modules, 'yaml' in sys.modules)"], env=ENV, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]


MISTAKES = [("pretrain", "umt", "--config", "no.yaml"), ("pretrain", "umt", "--config", "recipes/videomae_tiny.yaml"), ("pretrain", "umt", "--teacher", "tiny"),
            ("eval",), ("features", "--video", "no.mp4", "--weights", "no.pth"), ("pretrain", "umt", "--model", "umt_vit"), ("finetune", "--data.train", "no.csv"),
            ("classify",), ("classify", "no.mp4", "--weights", "no.pth"), ("classify", "data/clips", "--weights", "data/weights/tiny_clip.safetensors"), ("search", "a star"),
            ("classify", "data/clips/tour.mp4", "--weights", "no.pth"), ("search", "a star", "--videos", "data/clips", "--weights", "umt_vit_base_patch16")]


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vfm_lab", *words])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught: cli.main()
    assert str(caught.value).startswith("vfm_lab: ") and len(str(caught.value).splitlines()) == 1


# one process, two, four

KINDS = {"umt": PretrainUMT, "videomae": PretrainVideoMAE}


@pytest.fixture(scope="module", params=KINDS)
def runs(request, tmp_path_factory):
    "A run on one process, and the same on two with DDP."
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    recipe = recipes.read_recipe(ROOT / f"recipes/{name}_tiny.yaml", KINDS[name])
    recipe.out = str(folder / "one")
    recipes.pretrain(recipe)
    command("pretrain", name, "--config", f"recipes/{name}_tiny.yaml", "--out", folder / "two", "--machine.save-every", "10", processes=2)
    return name, folder


def same_curves(a, b):
    assert history(a)["step"] == history(b)["step"]
    for k in ("loss", "grad_norm", "lr"): assert_close(history(b)[k], history(a)[k], atol=1e-5, rtol=1e-5)
    for name, value in load_file(Path(a) / "model.safetensors").items():
        assert_close(load_file(Path(b) / "model.safetensors")[name], value, atol=1e-4, rtol=1e-4)


def without_the_end(folder, to):
    "A copy of a run that was stopped after step 10."
    shutil.copytree(folder, to, ignore=lambda _, names: {"model.safetensors", "step_00000020"} & set(names))
    shutil.copy(folder / "step_00000010/model.safetensors", to / "step_00000010")
    return to


def test_two_processes_are_one_run(runs):
    same_curves(runs[1] / "one", runs[1] / "two")


def test_a_checkpoint_of_two_goes_on_with_one(runs, tmp_path, monkeypatch):
    "The folder's own config.yaml starts it again."
    name, folder = runs
    out = without_the_end(folder / "two", tmp_path / "run")
    run(monkeypatch, "pretrain", name, "--config", out / "config.yaml", "--out", out)
    same_curves(folder / "one", out)


def test_a_torch_that_cannot_shard_says_so(monkeypatch):
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    with pytest.raises(ValueError, match=f"torch {torch.__version__.split('+')[0]}.* cannot shard a run on a CPU"): sharded(torch.nn.Linear(2, 2), Accelerator(cpu=True))

@shards
def test_a_checkpoint_of_two_goes_on_with_four_sharded(runs, tmp_path):
    "FSDP2, recompute, and more processes than began."
    name, folder = runs
    out = without_the_end(folder / "two", tmp_path / "run")
    command("pretrain", name, "--config", out / "config.yaml", "--out", out, "--machine.shard", "--machine.recompute", processes=4)
    same_curves(folder / "one", out)


@shards
@pytest.mark.parametrize("runs", ["videomae"], indirect=True)
def test_a_sharded_checkpoint_goes_on_with_one(runs, tmp_path, monkeypatch):
    "Sharded from the start and accumulating; then alone."
    folder, out, options = runs[1], tmp_path / "run", ("--machine.accumulate", "2", "--machine.save-every", "10")
    command("pretrain", "videomae", "--config", "recipes/videomae_tiny.yaml", "--out", out, "--machine.shard", *options, processes=2)
    same_curves(folder / "one", out)
    out = without_the_end(out, tmp_path / "again")
    run(monkeypatch, "pretrain", "videomae", "--config", out / "config.yaml", "--out", out, "--machine.no-shard")
    same_curves(folder / "one", out)


def test_what_a_run_leaves(runs, monkeypatch):
    name, folder = runs
    left = {p.name for p in (folder / "two").iterdir() if p.name != ".lock"}
    assert left == {"config.yaml", "history.json", "log.jsonl", "model.safetensors", "step_00000010", "step_00000020"}
    with safe_open(folder / "two/model.safetensors", "pt") as f: keys, about = list(f.keys()), json.loads(f.metadata()["config"])
    prefixes = {k.split(".")[0] for k in keys}
    assert prefixes == ({"encoder", "clip_decoder"} if name == "umt" else {"encoder", "decoder", "encoder_to_decoder", "mask_token"})
    assert about["model"].startswith(f"{name}_pretrain") and about["dim"] == 64
    assert yaml.safe_load((folder / "two/config.yaml").read_text())["machine"]["save_every"] == 10
    again = recipes.read_recipe(folder / "two/config.yaml", KINDS[name])
    again.out, again.schedule.base_lr = str(folder / "two"), 1e-3
    with pytest.raises(ValueError, match=r"schedule.base_lr was 0.064, now 0.001"): recipes.pretrain(again)


# shards, fine-tuning, features: in this process

def test_shards_go_on_exactly(tmp_path, monkeypatch):
    index = write_shards(VideoManifest(asset("clips/manifest.csv")).subset(range(32)), tmp_path / "shards", per_shard=4)
    go = partial(run, monkeypatch, "pretrain", "umt", "--config", "recipes/umt_tiny.yaml", "--data.train", index, "--data.workers", 2)
    go("--out", tmp_path / "whole")
    go("--out", tmp_path / "part", "--machine.save-every", 6)
    for late in checkpoints(tmp_path / "part"):
        if late.name > "step_00000018": shutil.rmtree(late)
    go("--out", tmp_path / "part", "--machine.save-every", 6)
    a, b = history(tmp_path / "whole"), history(tmp_path / "part")
    assert a["loss"] == b["loss"] and len(a["loss"]) == 20


def test_finetune_eval_features(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "pretrain", "umt", "--config", "recipes/umt_tiny.yaml", "--out", tmp_path / "pre", "--steps", 2)
    run(monkeypatch, "finetune", "--config", "recipes/finetune_tiny.yaml", "--init", tmp_path / "pre/model.safetensors", "--out", tmp_path / "ft", "--steps", 2)
    assert "fresh 4: fc_norm.weight" in capsys.readouterr().out
    model = ["--weights", tmp_path / "ft/model.safetensors", "--model", "umt_vit_base_patch16", "--classes", 8]
    arguments = yaml.safe_load((ROOT / "recipes/finetune_tiny.yaml").read_text())["model_args"]
    (tmp_path / "e.yaml").write_text(yaml.safe_dump({"model_args": arguments, "data": {"val": "sample", "frames": 4, "size": 64}, "test_clips": 2, "test_crops": 1}))
    run(monkeypatch, "eval", "--config", tmp_path / "e.yaml", *model)
    tested = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert tested == {k: json.loads((tmp_path / "ft/result.json").read_text())[k] for k in tested} and tested["videos"] == 35
    (tmp_path / "f.yaml").write_text(yaml.safe_dump({"model_args": arguments}))
    lists = tmp_path / "two.csv"
    lists.write_text("path,label\n" + "".join(f"{asset(f'clips/{n}.mp4')},0\n" for n in ("00_left", "moments")))
    for out, more in (("a.safetensors", ()), ("b.npz", ("--preprocess", "detection", "--precision", "bf16"))):
        run(monkeypatch, "features", "--config", tmp_path / "f.yaml", *model, "--video", lists, "--window", 8, "--out", tmp_path / out, *more)
        assert "30 windows of 2 videos" in capsys.readouterr().out
    (found, settings), (other, _) = load_features(tmp_path / "a.safetensors"), load_features(tmp_path / "b.npz")
    one = found[str(asset("clips/moments.mp4"))]
    assert one["features"].shape == (29, 64) and settings["preprocess"] == "eval" and one["frames"][3].tolist() == [12, 19]
    assert_close(one["seconds"][-1], torch.tensor([11.2, 12.0]))
    assert not torch.allclose(one["features"], other[str(asset("clips/moments.mp4"))]["features"], atol=1e-2)


def test_three_stages_in_a_row(tmp_path, monkeypatch, capsys):
    "Pre-training, post-pre-training, target: each starts from the file of the one before, and the target's head starts anew."
    clips = asset("clips")
    rows = list(csv.DictReader((clips / "manifest.csv").open()))
    (tmp_path / "colors.csv").write_text("path,label\n" + "".join(f"{clips / r['path']},{COLORS.index(r['color'])}\n" for r in rows))
    go, weights = partial(run, monkeypatch), lambda name: load_file(tmp_path / name / "model.safetensors")
    go("pretrain", "videomae", "--config", "recipes/videomae_tiny.yaml", "--out", tmp_path / "one", "--steps", 2)
    go("finetune", "--config", "recipes/videomae_tiny_post.yaml", "--init", tmp_path / "one/model.safetensors", "--out", tmp_path / "two", "--steps", 2, "--seed", 1)
    assert "fresh 4: fc_norm.weight" in capsys.readouterr().out
    data = ("--data.train", tmp_path / "colors.csv", "--data.val", tmp_path / "colors.csv")
    go("finetune", "--config", "recipes/videomae_tiny_target.yaml", "--init", tmp_path / "two/model.safetensors", *data, "--out", tmp_path / "three", "--steps", 2, "--seed", 2)
    said = capsys.readouterr().out
    assert "fresh 2: head.weight, head.bias" in said and "dropped 2: head." in said
    assert weights("two")["head.weight"].shape == (8, 64) and weights("three")["head.weight"].shape == (6, 64)
    close = lambda a, b: (a - b).abs().max() < 0.02                       # two small steps away; another seed starts elsewhere
    assert close(weights("one")["encoder.blocks.1.attn.qkv.weight"], weights("two")["blocks.1.attn.qkv.weight"])
    assert close(weights("two")["blocks.1.attn.qkv.weight"], weights("three")["blocks.1.attn.qkv.weight"])
    assert (first := json.loads((tmp_path / "three/result.json").read_text()))["videos"] == 35
    go("eval", "--config", tmp_path / "three/config.yaml")                 # a run is tested, and read, by its own config
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == first["top1"]
    go("features", "--config", tmp_path / "three/config.yaml", "--video", clips / "03_down.mp4", "--out", tmp_path / "f.npz")
    assert "windows of 1 videos" in capsys.readouterr().out


@pytest.mark.parametrize("words, says", [
    (("finetune", "--config", "videomae_tiny_post", "--classes", 6), "sample, line 8: label 6, classes are 0 to 5"),
    (("finetune", "--config", "recipes/videomae_tiny_post.yaml", "--data.val", "nowhere.csv"), "nowhere.csv: cannot be read"),
    (("finetune", "--config", "recipes/videomae_tiny.yaml"), "does not take these arguments"),
    (("pretrain", "videomae", "--config", "recipes/videomae_tiny.yaml", "--data.frames", 5), "does not divide into tubelets"),
])
def test_said_before_the_first_step(tmp_path, monkeypatch, words, says):
    out = () if words[0] == "eval" else ("--out", tmp_path / "run")
    assert says in str(leave(monkeypatch, *words, *out)) and not list(tmp_path.glob("run/step_*"))


def test_a_pretrained_file_has_no_head_to_test(tmp_path, monkeypatch):
    file, args = tmp_path / "pre.pth", [w for k, v in TINY.items() for w in (k, v)]
    sizes = dict(decoder_dim=32, decoder_depth=1, decoder_heads=2, decoder_mask=None)
    net = timm.create_model("videomae_pretrain_vit_base_patch16", **TINY, **sizes)
    torch.save({"model": net.state_dict()}, file)
    go = ("eval", "--weights", file, "--model", "videomae_vit_base_patch16", "--data.val", "sample")
    for kind in ((), ("--weights-from", "videomae_pretrained")):
        assert "has no head to test" in leave(monkeypatch, *go, *kind, "--model-args", *args)


def test_uniformerv2_from_clip_to_answers(tmp_path, monkeypatch, capsys):
    "Fine-tuned from the tiny CLIP; its file then says itself what it is and how it wants to see."
    out, clips = tmp_path / "run", asset("clips")
    run(monkeypatch, "finetune", "--config", "recipes/uniformerv2_tiny.yaml", "--init", "data/weights/tiny_clip.safetensors", "--out", out, "--steps", 2)
    assert "loaded 53 of 95" in capsys.readouterr().out
    started, weights = load_file(ROOT / "data/weights/tiny_clip.safetensors"), load_file(out / "model.safetensors")
    assert (started["vision.blocks.1.attn.qkv.weight"] - weights["blocks.1.attn.qkv.weight"]).abs().max() < 0.02
    assert json.loads((out / "result.json").read_text())["videos"] == 35
    (tmp_path / "names.txt").write_text("\n".join(f"motion {i}" for i in range(8)) + "\n")
    (tmp_path / "names.json").write_text(json.dumps([f"motion {i}" for i in range(8)]))
    (tmp_path / "videos").mkdir()
    shutil.copy(clips / "00_left.mp4", tmp_path / "videos/a.mp4")
    ask = ("classify", tmp_path / "videos", clips / "moments.mp4", "--weights", out / "model.safetensors", "--top", "3")
    run(monkeypatch, *ask, "--labels", tmp_path / "names.txt", "--json")
    said = json.loads(capsys.readouterr().out)
    assert [Path(a["video"]).name for a in said] == ["a.mp4", "moments.mp4"] and all(n.startswith("motion ") for n, _ in said[0]["classes"])
    found = load(out / "model.safetensors")
    assert found.spec == InputSpec(4, 64, "imagenet", "sparse")
    same = next(classify(found.model, [tmp_path / "videos/a.mp4"], found.spec, top=3))
    assert_close([p for _, p in same["classes"]], [p for _, p in said[0]["classes"]])
    run(monkeypatch, *ask, "--stats", "half", "--clips", "1", "--crops", "1", "--labels", tmp_path / "names.json")
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 8 and table[0].endswith("a.mp4") and table[1].split()[1] == "motion"
    (tmp_path / "videos/b.mp4").write_bytes(b"nothing")
    assert leave(monkeypatch, *ask) == 1
    both = capsys.readouterr()
    assert "b.mp4" in both.err and both.out.count("class ") == 6
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    assert "names.txt: 2 names, the head has 8 classes" in leave(monkeypatch, *ask, "--labels", tmp_path / "names.txt")
    assert "holds a uniformerv2_base_patch16, not a umt_vit_base_patch16" in leave(monkeypatch, *ask, "--model", "umt_vit_base_patch16")
    assert "mismatched" in leave(monkeypatch, *ask, "--model-args", "dim", "32")
    (tmp_path / "videos/b.mp4").unlink()
    run(monkeypatch, *ask, "--label-map", "first", "--labels", tmp_path / "names.txt")
    assert {"one", "two"} == {line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}


def test_official_files_are_asked(tmp_path, monkeypatch, capsys):
    "Official layouts of the three systems, each with the statistics and the sampling of its own."
    torch.manual_seed(0)
    vit = {"image_size": 32, "patch": 8, "dim": 48, "depth": 2, "heads": 4}
    umt_model = timm.create_model("umt_vit_base_patch16", num_classes=5, frames=4, drop_path=0.0, head_scale=1.0, **vit).eval()
    mae_model = timm.create_model("videomae_vit_base_patch16", num_classes=5, frames=4, head_scale=1.0, **vit).eval()
    uni = {"image_size": 32, "patch": 8, "dim": 48, "depth": 4, "heads": 4, "frames": 4, "global_layers": [2, 3]}
    official = {f"backbone.{k}": v for k, v in fill(official_uniformerv2(0, 2, 1, False)).items()}
    cases = {"umt_vit_base_patch16": ({"model": umt_model.state_dict()}, vit | {"frames": 4}, "imagenet", "sparse"),
             "videomae_vit_base_patch16": ({"module": mae_model.state_dict()}, vit | {"frames": 4}, "imagenet", "dense"),
             "uniformerv2_base_patch16": ({"model_state": official}, uni, "half", "sparse")}
    for name, (state, args, stats, sampling) in cases.items():
        torch.save(state, tmp_path / "w.pth")
        found = load(tmp_path / "w.pth", name, **args)
        net, how = found.model, found.spec
        assert (how.stats, how.sampling, how.frames, how.size) == (stats, sampling, 4, 32)
        if net.__class__.__name__ == "UMTClassifier":
            with torch.no_grad(): assert_close(net(noise(1, 1, 3, 4, 32, 32)), umt_model(noise(1, 1, 3, 4, 32, 32)))
        words = [w for k, v in args.items() for w in (k, *(v if isinstance(v, list) else [v]))]
        run(monkeypatch, "classify", asset("clips/moments.mp4"), "--model", name, "--model-args", *words, "--weights", tmp_path / "w.pth", "--json", "--clips", 2)
        said = json.loads(capsys.readouterr().out)[0]["classes"]
        assert abs(sum(p for _, p in said) - 1) < 1e-4
        assert "say which model it is" in leave(monkeypatch, "classify", asset("clips/moments.mp4"), "--weights", tmp_path / "w.pth")


def test_search(tmp_path, monkeypatch, capsys):
    "An index is made, kept, renewed where files change, and made anew for other weights."
    torch.manual_seed(0)
    weights, index, folder = tmp_path / "tower.safetensors", tmp_path / "i.safetensors", tmp_path / "videos"
    tiny = Towers(tiny_video_text(frames=4, captions=False), word_tokenizer(caption_words()), 4, 64, "imagenet", 12, len(caption_words()))
    save_towers(tiny, weights)
    folder.mkdir()
    for name in ("00_left", "01_right", "02_up"): shutil.copy(asset(f"clips/{name}.mp4"), folder)
    ask = ("search", "a red circle moves left", "a star", "--videos", folder, "--weights", weights, "--index", index, "--top", "2")
    run(monkeypatch, *ask)
    first = capsys.readouterr().out
    assert "3 videos: 3 embedded now" in first and first.count(".mp4") == 4
    run(monkeypatch, *ask)
    assert "3 videos: 0 embedded now" in (again := capsys.readouterr().out) and again.splitlines()[1:] == first.splitlines()[1:]
    shutil.copy(asset("clips/tour.mp4"), folder / "02_up.mp4")
    (folder / "bad.mp4").write_bytes(b"nothing")
    assert leave(monkeypatch, *ask, "--json") == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert "bad.mp4" in said.err and [a.get("text") for a in found] == ["a red circle moves left", "a star", None] and len(found[0]["videos"]) == 2
    (folder / "bad.mp4").unlink()
    run(monkeypatch, *ask)
    assert "0 embedded now" in capsys.readouterr().out
    save_towers(tiny, weights)                                       # the same weights, written again
    run(monkeypatch, *ask)
    assert "3 videos: 0 embedded now" in capsys.readouterr().out
    with torch.no_grad():
        tiny.model.proj.mul_(-1)
    save_towers(tiny, weights)                                       # others
    run(monkeypatch, *ask)
    assert "3 videos: 3 embedded now" in capsys.readouterr().out
    for words, message in ((("search", "a red car", *ask[3:]), "cannot read 'a red car'"), ((*ask, "--index", folder / "00_left.mp4"), "not an index"),
                           ((*ask, "--tokenizer", tmp_path / "no.json"), "no.json: not a tokenizer"), (("search", "a star", *ask[3:], "--tokenizer", "data/weights/tiny_clip_tokenizer.json"), "another model")):
        assert message in leave(monkeypatch, *words)
    with safe_open(index, "pt") as f: vectors = f.get_tensor("vectors")
    assert_close(vectors.norm(dim=1), torch.ones(3))


def test_search_with_an_official_file(tmp_path, monkeypatch, capsys):
    "InternVideo's layout, CLIP's statistics and eight frames; the tokenizer comes from outside."
    state = {f"clip.{k}": v for k, v in fill(official_multimodal(dim=64, width=64)).items()}
    torch.save({"state_dict": state}, tmp_path / "mm.ckpt")
    (tmp_path / "t.json").write_text(word_tokenizer([f"w{i}" for i in range(100)]).to_str())
    towers = recipes.open_towers(tmp_path / "mm.ckpt", tmp_path / "t.json")
    assert (towers.stats, towers.frames, towers.size, towers.context, towers.vocab) == ("clip", 8, 32, 12, 100)
    ask = ("search", "w5 w7", "--videos", asset("clips/tour.mp4"), asset("clips/moments.mp4"), "--weights", tmp_path / "mm.ckpt", "--index", tmp_path / "i.safetensors")
    run(monkeypatch, *ask, "--tokenizer", tmp_path / "t.json")
    assert capsys.readouterr().out.count(".mp4") == 2
    assert "brings no tokenizer" in leave(monkeypatch, *ask)
    for key in ("clip.ln_final.weight", "clip.visual.conv1.weight"):
        torch.save({"state_dict": {k: v for k, v in state.items() if k != key}}, tmp_path / "mm.ckpt")
        assert key.removeprefix("clip.").replace("ln_final", "text.norm") in leave(monkeypatch, *ask, "--tokenizer", tmp_path / "t.json")


@shards
def test_two_processes_test_together(tmp_path):
    "Fine-tuned on two processes, sharded, in bf16; the file's accuracy is the same when one process measures it."
    out = tmp_path / "ft"
    command("finetune", "--config", "recipes/finetune_tiny.yaml", "--out", out, "--steps", "2", "--machine.shard", "--machine.precision", "bf16", processes=2)
    together = json.loads((out / "result.json").read_text())
    again = recipes.Evaluate(**{k: v for k, v in together["recipe"].items() if k not in ("data", "out")}, data=Data(**together["recipe"]["data"]))
    alone = recipes.evaluate(again)
    assert together["videos"] == alone["videos"] == 35 and abs(together["top1"] - alone["top1"]) < 1e-6 and abs(together["top5"] - alone["top5"]) < 1e-6


def test_a_broken_clip_in_a_shard(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(asset("clips/00_left.mp4").read_bytes()[:900])
    data = VideoManifest(asset("clips/manifest.csv")).subset(range(8))
    data.items = data.items[:5] + [{"path": str(tmp_path / "broken.mp4"), "label": 0}] + data.items[5:7]
    index = write_shards(data, tmp_path / "shards")
    small = dict(transform=eval_transform(32), shuffle=0)
    with pytest.raises(VideoReadError, match=r"00000.tar, broken.mp4"): list(VideoShards(index, 4, **small))
    batches = list(VideoShards(index, 4, on_error="skip", **small))
    assert batches[1]["name"][:2] == ["04_grow.mp4"] * 2 and "broken.mp4" in batches[1]["skipped"][0] and torch.equal(*batches[1]["clip"][:2])


# numbers and files of recipes

@pytest.mark.parametrize("text, more, says", [
    ("machine: {accumulate: 3}", ("--schedule.batch", 8), "machine.accumulate: 3 does not divide"),
    ("label_map: first", (), "label_map: needs init"),
])
def test_a_file_may_be_half_of_a_run(tmp_path, monkeypatch, text, more, says):
    "What contradicts itself is told when the run starts, since options may complete the file."
    (tmp_path / "r.yaml").write_text(f"model: umt_vit_base_patch16\n{text}\n")
    go = ("finetune", "--config", tmp_path / "r.yaml", "--out", tmp_path / "run", "--data.train", "sample")
    assert says in leave(monkeypatch, *go, *more) and not (tmp_path / "run").exists()


OUT_OF_RANGE = {
    "machine: {keep: -1}": "machine.keep: must be",
    "machine: {keep: 0}": "machine.keep: must be",
    "machine: {save_every: -5}": "machine.save_every: must be",
    "machine: {accumulate: 0}": "machine.accumulate: must be",
    "schedule: {epochs: 0}": "schedule.epochs: must be",
    "schedule: {epochs: .inf}": "schedule.epochs: must be",
    "schedule: {epochs: .nan}": "schedule.epochs: must be",
    "schedule: {base_lr: .nan}": "schedule.base_lr: must be",
    "schedule: {base_lr: -1e-3}": "schedule.base_lr: must be",
    "schedule: {betas: [0.9, 1.0]}": "schedule.betas: must be",
    "schedule: {eps: 0}": "schedule.eps: must be",
    "schedule: {clip_grad: 0}": "schedule.clip_grad: must be",
    "schedule: {layer_decay: 0}": "schedule.layer_decay: must be",
    "schedule: {batch: 0}": "schedule.batch: must be",
    "steps: -5": "steps: must be",
    "steps: 0": "steps: must be",
    "data: {size: 0}": "data.size: must be",
    "data: {frames: 10000000000}": "data.frames: must be",
    "data: {erase: 1.5}": "data.erase: must be",
    "data: {workers: -1}": "data.workers: must be",
    "data: {workers: 1000000000}": "data.workers: must be",
    "data: {views: 1000000000}": "data.views: must be",
    "test_clips: 0": "test_clips: must be",
    "smoothing: 1": "smoothing: must be",
    "mixup: -0.1": "mixup: must be",
    "test_crops: 2": "test_crops: must be 1 or 3",
    "classes: 0": "classes: must be",
    "model_args: {drop_path: .nan}": "model_args.drop_path: must be a finite number",
    "model_args: {sizes: [1, .inf]}": "model_args.sizes",
}


@pytest.mark.parametrize("text", OUT_OF_RANGE, ids=lambda t: t.replace("\n", ", "))
def test_a_number_out_of_range_is_named(text, tmp_path):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        recipes.read_recipe(tmp_path / "p.yaml", recipes.Finetune)
    assert str(caught.value).startswith(f"{tmp_path / 'p.yaml'}: {OUT_OF_RANGE[text]}")


@pytest.mark.parametrize(
    "option, value, says",
    [
        ("--machine.keep", "-1", "machine.keep: must be greater than or equal to 1, got -1"),
        ("--schedule.epochs", "inf", "schedule.epochs: must be"),
        ("--schedule.base-lr", "nan", "schedule.base_lr: must be"),
        ("--steps", "0", "steps: must be greater than or equal to 1, got 0"),
        ("--schedule.epochs", "0.01", "schedule.epochs: 0.01 of 4 steps are not one"),
        ("--schedule.batch", "36", "do not fill a batch of 36"),
    ],
)
def test_an_option_out_of_range_is_named(option, value, says, tmp_path, monkeypatch):
    start = ("pretrain", "videomae", "--config", "videomae_tiny", "--out", tmp_path / "run")
    assert says in leave(monkeypatch, *start, option, value)
    assert not (tmp_path / "run").exists()


HOSTILE = {
    "deep": "[" * 200000,
    "bomb": "a: &a [x]\n"
    + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}, *{chr(97 + i)}]\n"
        for i in range(9)
    ),
    "merge bomb": "a: &a {k: 1}\n"
    + "".join(
        f"b{i}: &b{i} {{<<: [*{'a' if not i else f'b{i - 1}'}, *a, *a]}}\n" for i in range(30)
    ),
    "digits": "seed: " + "9" * 5000,
    "itself": "model_args: &m {x: *m}",
    "bool": "a: !!bool maybe",
    "time": "a: !!timestamp x",
    "date": "a: 2024-13-45",
    "no number": "a: !!int ''",
    "object": "a: !!python/name:os.system",
    "bytes": b"\xff\xfe\x00",
    "list": "[]",
    "false": "false",
    "large": "# " + "x" * (2 << 20),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_one_line_that_names_the_file(name, tmp_path, monkeypatch):
    text, file = HOSTILE[name], tmp_path / "p.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = leave(monkeypatch, "finetune", "--config", file)
    assert said.startswith(f"vfm_lab: {file}: ") and len(said.splitlines()) == 1 and len(said) < 400


def test_recipes_of_the_lab_have_names(tmp_path, monkeypatch):
    "Outside of a clone there is no folder `recipes`; a file that exists wins over a name."
    monkeypatch.chdir(tmp_path)
    for name in ("videomae_tiny", "videomae_tiny.yaml"):
        assert recipe_file(name).resolve() == ROOT / "recipes/videomae_tiny.yaml"
    with pytest.raises(
        ValueError, match="^vidoemae_tiny: no such file.*did you mean videomae_tiny"
    ):
        recipe_file("vidoemae_tiny")
    (tmp_path / "videomae_tiny").mkdir()
    assert recipe_file("videomae_tiny").suffix == ".yaml"
    (tmp_path / "videomae_tiny.yaml").write_text("seed: 7\n")
    parsed = cli.parse(PretrainVideoMAE, ["--config", "videomae_tiny.yaml"], "x")
    assert parsed.seed == 7


# what the command says


class Odd(Exception):
    "An error of the program."


@pytest.mark.parametrize(
    "error, says",
    [
        (ValueError("a\x1b[2J\nb"), "vfm_lab: a\\x1b[2J; b"),
        (
            FileNotFoundError(2, "No such file or directory", "x\ty"),
            "vfm_lab: x\\ty: No such file or directory",
        ),
        (VideoReadError("v.mp4: truncated"), "vfm_lab: v.mp4: truncated"),
        (FloatingPointError("loss nan"), "vfm_lab: loss nan"),
        (RecursionError("too deep"), "vfm_lab: too deep"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_main_says(error, says, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "search", fails)
    assert leave(monkeypatch, "search") == says


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch):
    for error in (Odd(), KeyError("x"), TypeError("x"), RuntimeError("x"), ZeroDivisionError()):

        def fails(*_, error=error):
            raise error

        monkeypatch.setitem(cli.COMMANDS, "search", fails)
        monkeypatch.setattr(sys, "argv", ["vfm_lab", "search"])
        with pytest.raises(type(error)):
            cli.main()


def test_an_error_in_a_worker_is_one_line(tmp_path, monkeypatch):
    for i in range(4):
        (tmp_path / f"{i}.mp4").write_bytes(b"nothing")
    (tmp_path / "l.csv").write_text("".join(f"{i}.mp4,0\n" for i in range(4)))
    go = (
        "pretrain",
        "videomae",
        "--config",
        "videomae_tiny",
        "--data.train",
        tmp_path / "l.csv",
        "--schedule.batch",
        4,
        "--out",
        tmp_path / "run",
        "--data.workers",
        1,
    )
    said = leave(monkeypatch, *go)
    assert said.startswith(f"vfm_lab: {tmp_path}/") and ".mp4" in said and "Traceback" not in said


def test_version_and_doctor(monkeypatch, capsys):
    run(monkeypatch, "--version")
    assert capsys.readouterr().out == f"vfm_lab {cli.__version__}\n"

    def absent(name):
        raise cli.metadata.PackageNotFoundError

    monkeypatch.setattr(cli.metadata, "version", absent)
    run(monkeypatch, "doctor")
    said = capsys.readouterr().out
    assert "decord       not installed (optional" in said and "av           not installed\n" in said


def test_names_cannot_forge_lines(capsys):
    name = "a\x1b]0;owned\x07\nfake.mp4: 1.0\u202e\x9b2J"
    cli._answers(
        [{"video": name, "classes": [("x\ny", 0.5)]}, {"error": f"{name}: bad"}],
        "video",
        "classes",
        False,
    )
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2 and len(said.err.splitlines()) == 1
    assert all(c.isprintable() or c == "\n" for c in said.out + said.err)
    cli._answers([{"video": name, "classes": [("x\ny", 0.5)]}], "video", "classes", True)
    told = capsys.readouterr().out
    assert told.isascii() and json.loads(told)[0]["video"] == name
    with pytest.raises(ValueError):
        cli._answers([{"video": "a", "classes": [("x", float("nan"))]}], "video", "classes", True)


@pytest.mark.parametrize(
    "place", ["pipe:touch PWNED #/index.json", "http://127.0.0.1:9/index.json", "a::b?c/index.json"]
)
def test_a_name_of_data_runs_nothing(place, tmp_path, monkeypatch):
    source = write_shards(
        VideoManifest(asset("clips/manifest.csv")).subset(range(8)), tmp_path / "source"
    )
    monkeypatch.chdir(tmp_path)
    folder = Path(place).parent
    shutil.copytree(source.parent, folder)
    recipe = recipes.read_recipe(recipe_file("videomae_tiny"), PretrainVideoMAE)
    recipe.data.train, recipe.schedule.batch = place, 4
    assert len(list(recipes.train_loader(recipe))) == 2
    assert not list(tmp_path.rglob("PWNED"))


# weights say how they want to be read, and what their classes are called

TINY = dict(image_size=32, patch=8, frames=4, dim=32, depth=1, heads=2)


def small(path, model="umt_vit_base_patch16", rows=4, **header):
    "A weight file of a tiny classifier, with this in its header."
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=rows, head_scale=1.0, **TINY)
    save_weights(net, path, {"model": model, **net.config, **header} if header else net.config)
    return path


def as_folders(folder, names):
    "One class folder with two of the lab's clips for each motion that is named."
    for name in names:
        (folder / name).mkdir(parents=True)
        for clip in sorted(asset("clips").glob(f"*_{name}.mp4"))[:2]:
            shutil.copy(clip, folder / name)
    return folder


def test_features_are_made_as_the_weights_say(tmp_path, monkeypatch, capsys):
    "Statistics of the header; an option wins over them and the difference is said."
    file = small(
        tmp_path / "w.safetensors", input={"stats": "clip", "sampling": "sparse", "stride": 4}
    )
    video = asset("clips/00_left.mp4")
    ask = (
        "features",
        "--video",
        video,
        "--weights",
        file,
        "--window",
        4,
        "--out",
        tmp_path / "f.npz",
    )
    found = load(file)
    net = found.model
    assert found.spec.stats == "clip"

    def right(stats):
        return extract_features(pooled(net), video, window=4, frames=4, size=32, stats=stats)[
            "features"
        ]

    run(monkeypatch, *ask)
    assert "stats" not in capsys.readouterr().err
    ((found, settings),) = [load_features(tmp_path / "f.npz")]
    assert torch.equal(found[str(video)]["features"], right("clip")) and settings["stats"] == "clip"
    run(monkeypatch, *ask, "--stats", "half")
    assert (
        "w.safetensors: stats clip is usual for these weights, stats half"
        in capsys.readouterr().err
    )
    assert torch.equal(load_features(tmp_path / "f.npz")[0][str(video)]["features"], right("half"))
    nonsense = small(tmp_path / "n.safetensors", input={"stats": "evil"})
    assert "n.safetensors: its header says: input stats is one of" in leave(
        monkeypatch, *ask, "--weights", nonsense
    )


def test_features_of_a_list_lose_only_the_bad_file(tmp_path, monkeypatch, capsys):
    "Of two files with one name both are kept; what is made is in the file at once."
    file, names = small(tmp_path / "w.safetensors", input={}), ["a/x.mp4", "bad.mp4", "b/x.mp4"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
    for name, clip in zip(names, ("00_left", "01_right", "02_up")):
        shutil.copy(asset(f"clips/{clip}.mp4"), tmp_path / name)
    (tmp_path / "bad.mp4").write_bytes((tmp_path / "bad.mp4").read_bytes()[:900])
    listed = "".join(f"{name},0\n" for name in names)
    (tmp_path / "l.csv").write_text(listed + "gone.mp4,0\n")
    ask = (
        "features",
        "--video",
        tmp_path / "l.csv",
        "--weights",
        file,
        "--window",
        4,
        "--out",
        tmp_path / "f.safetensors",
    )
    assert leave(monkeypatch, *ask) == 1
    said = capsys.readouterr()
    assert (
        said.err.count("vfm_lab: ") == 2
        and f"{tmp_path}/bad.mp4" in said.err
        and f"{tmp_path}/gone.mp4" in said.err
        and "8 windows of 2 videos" in said.out
    )
    found = load_features(tmp_path / "f.safetensors")[0]
    assert set(found) == {str(tmp_path / "a/x.mp4"), str(tmp_path / "b/x.mp4")}
    a, b = found.values()
    assert not torch.equal(a["features"], b["features"])
    (tmp_path / "f.safetensors").unlink()
    real, seen = recipes._Growing.write, []

    def stopped(self):
        real(self)
        seen.append(set(load_features(self.file)[0]))
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes._Growing, "write", stopped)
    assert leave(monkeypatch, *ask) == 130 and seen == [{str(tmp_path / "a/x.mp4")}]
    monkeypatch.undo()
    (tmp_path / "f.safetensors").unlink()
    for name in names:
        (tmp_path / name).write_bytes(b"nothing")
    assert "l.csv: none of its 4 videos could be read" in leave(monkeypatch, *ask)
    assert not (tmp_path / "f.safetensors").exists()


def test_classes_go_by_name(tmp_path, monkeypatch, capsys):
    "A folder that lacks a class, or has one more; the names travel with the weights."
    train = as_folders(tmp_path / "train", ["down", "left", "right", "up"])
    val = as_folders(tmp_path / "val", ["right", "up"])
    more = as_folders(tmp_path / "more", ["grow", "right"])
    args = [w for k, v in TINY.items() for w in (k, v)]
    data = (
        "--data.train",
        train,
        "--data.val",
        val,
        "--data.frames",
        4,
        "--data.size",
        32,
        "--data.no-flip",
    )
    go = (
        "finetune",
        "--model",
        "umt_vit_base_patch16",
        "--model-args",
        *args,
        "--classes",
        4,
        *data,
        "--schedule.batch",
        4,
        "--test-clips",
        1,
        "--test-crops",
        1,
        "--mixup",
        0,
        "--cutmix",
        0,
        "--out",
        tmp_path / "run",
    )
    run(monkeypatch, *go)
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    weights = tmp_path / "run/model.safetensors"
    assert read_config(weights)["classes"] == ["down", "left", "right", "up"]
    run(
        monkeypatch,
        "classify",
        val,
        "--weights",
        weights,
        "--clips",
        1,
        "--crops",
        1,
        "--top",
        1,
        "--json",
    )
    named = json.loads(capsys.readouterr().out)
    right = sum(a["classes"][0][0] == Path(a["video"]).parent.name for a in named)
    assert len(named) == 4 and {a["classes"][0][0] for a in named} <= {
        "down",
        "left",
        "right",
        "up",
    }
    assert first["top1"] == right / 4
    seen = ("--test-clips", 1, "--test-crops", 1)
    run(
        monkeypatch, "eval", "--weights", weights, "--data.val", val, *seen
    )  # model, sizes and names: the file says them
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == right / 4
    assert "'grow' is not among the 4 classes" in leave(
        monkeypatch, "eval", "--weights", weights, "--data.val", more, *seen
    )
    assert "'grow' is not among the 4 classes" in leave(
        monkeypatch, *go[:-1], tmp_path / "other", "--data.val", more
    )
    assert not (tmp_path / "other").exists()
    unnamed = small(tmp_path / "w.safetensors", input={})
    assert f"{val}: has 2 classes (right, up), expected 4" in leave(
        monkeypatch, "eval", "--weights", unnamed, "--data.val", val, *seen
    )
    (tmp_path / "names.txt").write_text("down\nleft\nright\nup\n")
    run(
        monkeypatch,
        "eval",
        "--weights",
        unnamed,
        "--data.val",
        val,
        "--labels",
        tmp_path / "names.txt",
        *seen,
    )
    (tmp_path / "minus.csv").write_text(f"{asset('clips/00_left.mp4')},-1\n")
    says = f"{tmp_path}/minus.csv, line 1: label -1, classes are 0 to 3"
    assert says in leave(
        monkeypatch, "eval", "--weights", weights, "--data.val", tmp_path / "minus.csv", *seen
    )
    assert says in leave(
        monkeypatch, *go[:-1], tmp_path / "other", "--data.train", tmp_path / "minus.csv"
    )
    assert says in leave(
        monkeypatch, *go[:-1], tmp_path / "other", "--data.val", tmp_path / "minus.csv"
    )


def test_names_of_the_rows_that_are_kept(tmp_path):
    file = small(tmp_path / "w.safetensors", rows=3, classes=["a", "b", "c"], input={})
    assert load(file).labels == ["a", "b", "c"]
    assert load(file, label_map=[2, 0]).labels == ["c", "a"]
    few = load(small(tmp_path / "f.safetensors", rows=3, classes=["a"], input={}))
    said = next(classify(few.model, [asset("clips/00_left.mp4")], few.spec, few.labels, top=3, clips=1, crops=1))
    assert {name for name, _ in said["classes"]} == {"a", "class 1", "class 2"}


def test_a_pretrained_file_of_hugging_face(tmp_path):
    "The encoder of `VideoMAEForPreTraining` starts a fine-tuning, with equal features."
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(
        image_size=32,
        patch_size=8,
        num_frames=4,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        use_mean_pooling=False,
        layer_norm_eps=1e-6,
    )
    theirs = transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig(**sizes)).eval()
    torch.save(theirs.state_dict(), tmp_path / "hf.pth")
    recipe = recipes.Finetune(model="videomae_vit_base_patch16", model_args=TINY, classes=4)
    model = recipe.build(create_model).eval()
    report = str(fill_from(model, tmp_path / "hf.pth", layout="videomae_pretrained", new_head=True))
    assert "missing" not in report and "fresh" in report
    clip = noise(1, 2, 3, 4, 32, 32)
    with torch.no_grad():
        hidden = theirs.videomae.embeddings(
            clip.transpose(1, 2), torch.zeros(2, 32, dtype=torch.bool)
        )
        for layer in theirs.videomae.encoder.layer:
            hidden = layer(hidden)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        ours = []
        model.fc_norm.register_forward_pre_hook(lambda _, given: ours.append(given[0]))
        model(clip)
    assert_close(ours[0], hidden.mean(1), atol=1e-5, rtol=1e-4)


# runs and their folders


def videomae_run(out, **changes):
    recipe = recipes.read_recipe(ROOT / "recipes/videomae_tiny.yaml", PretrainVideoMAE)
    recipe.out = str(out)
    for key, value in changes.items():
        place, _, name = key.rpartition("__")
        setattr(getattr(recipe, place) if place else recipe, name, value)
    return recipe


def test_a_start_that_failed_leaves_its_folder_free(tmp_path, monkeypatch):
    out = tmp_path / "run"

    def fails(*_, **__):
        raise ValueError("no first step")

    with monkeypatch.context() as m:
        m.setattr("vfm_lab.train.loop.fit", fails)
        with pytest.raises(ValueError, match="no first step"):
            recipes.pretrain(videomae_run(out, steps=1, seed=1))
    (out / "config.yaml").write_text("")  # as a crash would leave it
    recipes.pretrain(videomae_run(out, steps=1))
    config = out / "config.yaml"
    before = config.stat().st_mtime_ns, config.stat().st_ino
    recipes.pretrain(videomae_run(out, steps=1))
    assert (
        config.stat().st_mtime_ns,
        config.stat().st_ino,
    ) == before  # it says the same: not written again
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        recipes.pretrain(videomae_run(out, steps=1, seed=1))
    config.unlink()
    with pytest.raises(ValueError, match="holds checkpoints but no config.yaml"):
        recipes.pretrain(videomae_run(out, steps=1))
    assert not [p for p in out.iterdir() if p.name.endswith(".draft")]


def test_accumulation_changes_nothing(tmp_path):
    "35 clips in steps of 8 are 4 steps an epoch, however cut; six reach into the second epoch."
    curves = {}
    for parts in (1, 4):
        recipe = videomae_run(
            tmp_path / str(parts), steps=6, data__size=32, machine__accumulate=parts
        )
        recipe.model_args |= {"image_size": 32, "depth": 1}
        assert recipes.steps_in_epoch(recipe, recipes.train_loader(recipe)) == 35 // 8
        curves[parts] = recipes.pretrain(recipe)
    assert curves[1]["lr"] == curves[4]["lr"]
    assert_close(curves[1]["loss"], curves[4]["loss"], atol=1e-5, rtol=1e-5)


def test_accumulation_counts_shards_alike(tmp_path):
    data = VideoManifest(asset("clips/manifest.csv")).subset(range(30))
    index = write_shards(data, tmp_path / "shards", per_shard=15)
    for workers, steps in ((0, 3), (2, 2)):  # two readers of 15 clips: one step of 8 each
        for parts in (1, 2, 4):
            recipe = videomae_run(
                tmp_path, data__train=str(index), data__workers=workers, machine__accumulate=parts
            )
            assert recipes.steps_in_epoch(recipe, recipes.train_loader(recipe)) == steps


def test_curves_without_a_number_can_be_written(tmp_path):
    "Under fp16 a gradient norm may be infinite; JSON knows no infinity."
    assert recipes._curves({"grad_norm": [1.0, float("inf"), float("nan")]}) == {
        "grad_norm": [1.0, None, None]
    }


# scores that are no numbers


class Nothing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(float("nan")))

    def forward(self, clip):
        return torch.zeros(len(clip), 4) * self.w


def test_nan_is_no_answer():
    x, y, bad = torch.randn(12, 5), torch.arange(12) % 3, torch.full((12, 5), float("nan"))
    batch = {
        "clip": torch.zeros(2, 3, 4, 8, 8),
        "label": torch.zeros(2, dtype=torch.long),
        "path": ["a.mp4", "b.mp4"],
    }
    with pytest.raises(ValueError, match="^a.mp4: scores"):
        measure(Nothing(), [batch], 4)
    with pytest.raises(ValueError, match="00_left.mp4: scores"):
        next(classify(Nothing(), [asset("clips/00_left.mp4")], InputSpec(4, 32)))
    for method in (recognition.knn_accuracy, recognition.linear_probe):
        with pytest.raises(ValueError, match="training features"):
            method(bad, y, x, y)
        with pytest.raises(ValueError, match="test features"):
            method(x, y, bad, y)
    with pytest.raises(ValueError, match="test features"):
        recognition.attentive_probe(
            x.view(12, 5, 1).expand(-1, -1, 4), y, bad.view(12, 5, 1).expand(-1, -1, 4), y, steps=1
        )
    with pytest.raises(ValueError, match="cosines"):
        find(x, bad)
    with pytest.raises(ValueError, match="scores of the classes"):
        zero_shot(bad, x, 100.0)


# an index from elsewhere


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    "Towers, their weights, two videos, and what a good index of them holds."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("index")
    tiny = Towers(
        tiny_video_text(frames=4, captions=False),
        word_tokenizer(caption_words()),
        4,
        64,
        "imagenet",
        12,
        len(caption_words()),
    )
    save_towers(tiny, folder / "w.safetensors")
    videos = [asset(f"clips/{n}.mp4") for n in ("00_left", "01_right")]
    video_index(tiny, videos, folder / "i.safetensors")
    with safe_open(folder / "i.safetensors", "pt") as f:
        about, vectors = json.loads(f.metadata()["index"]), f.get_tensor("vectors").clone()
    return tiny, folder, videos, about, vectors


TAMPERED = {
    "list": lambda a, v: ([], v),
    "null": lambda a, v: (None, v),
    "no settings": lambda a, v: ({"videos": a["videos"]}, v),
    "no videos": lambda a, v: ({"settings": a["settings"]}, v),
    "deep": lambda a, v: ("[" * 100000 + "]" * 100000, v),
    "not json": lambda a, v: ("{bad", v),
    "fewer": lambda a, v: (a, v[:1].clone()),
    "more": lambda a, v: (a, torch.cat([v, v])),
    "nan": lambda a, v: (a, v * float("nan")),
    "narrow": lambda a, v: (a, torch.nn.functional.normalize(v[:, :5], dim=1).contiguous()),
    "int8": lambda a, v: (a, v.to(torch.int8)),
    "half": lambda a, v: (a, v.half()),
    "1-d": lambda a, v: (a, v[:, 0].contiguous()),
    "large": lambda a, v: (a, v * 1e30),
    "no pairs": lambda a, v: ({**a, "videos": ["a", "b"]}, v),
    "numbers": lambda a, v: ({**a, "videos": [[1, 2], [3, 4]]}, v),
    "NaN": lambda a, v: ('{"settings": NaN}', v),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_index_is_refused(name, indexed, tmp_path):
    tiny, folder, videos, about, vectors = indexed
    words, numbers = TAMPERED[name](about, vectors)
    file = tmp_path / "i.safetensors"
    save_file(
        {"vectors": numbers},
        file,
        {"index": words if isinstance(words, str) else json.dumps(words)},
    )
    before = file.read_bytes()
    with pytest.raises(ValueError) as caught:
        video_index(tiny, videos, file)
    assert (
        str(caught.value).startswith(f"{file}: ")
        and len(str(caught.value).splitlines()) == 1
        and file.read_bytes() == before
    )


def test_an_index_does_not_lean_on_its_file(indexed, tmp_path):
    "Vectors are copies: who overwrites the file changes no answer. Every 50 videos are written."
    tiny, folder, videos, about, vectors = indexed
    file = shutil.copy(folder / "i.safetensors", tmp_path)
    stored = video_index(tiny, videos, file)
    with open(file, "r+b") as f:
        f.write(b"\xff" * Path(file).stat().st_size)
    assert stored.made == 0 and torch.equal(stored.vectors, vectors)
    for i in range(52):
        shutil.copy(videos[0], tmp_path / f"{i}.mp4")
    Path(file).unlink()
    embed, calls = tiny.video, []

    def slow(path):
        calls.append(path)
        if len(calls) == 52:
            raise KeyboardInterrupt
        return vectors[0]

    tiny.video = slow
    try:
        with pytest.raises(KeyboardInterrupt):
            video_index(tiny, sorted(tmp_path.glob("*.mp4")), file)
        tiny.video = lambda path: vectors[1]
        assert (
            video_index(tiny, sorted(tmp_path.glob("*.mp4")), file).made
            == 2
        )
    finally: tiny.video = embed


def test_counts_of_answers_are_checked(tmp_path, monkeypatch):
    video, file = asset("clips/00_left.mp4"), small(tmp_path / "w.safetensors")
    ask = ("classify", video, "--weights", file)
    assert "top: must be greater than or equal to 1, got 0" in leave(monkeypatch, *ask, "--top", 0)
    assert "clips: must be less than or equal to" in leave(monkeypatch, *ask, "--clips", 10**9)
    ask = ("search", "a star", "--videos", video, "--weights", file)
    assert "top: must be greater than or equal to 1, got -1" in leave(monkeypatch, *ask, "--top", -1)


def test_what_a_folder_holds_besides_videos_is_counted(tmp_path, monkeypatch, capsys):
    file = small(tmp_path / "w.safetensors", input={})
    (tmp_path / "in").mkdir()
    shutil.copy(asset("clips/00_left.mp4"), tmp_path / "in/a.mp4")
    for name in ("a.avi.part", "notes.txt", ".hidden.mp4"):
        (tmp_path / "in" / name).write_bytes(b"x")
    run(monkeypatch, "classify", tmp_path / "in", "--weights", file, "--clips", 1, "--crops", 1)
    assert f"{tmp_path}/in: left out: " in (said := capsys.readouterr().err)
    assert all(kind in said for kind in ("1 .part", "1 .txt", "1 hidden"))


def test_a_test_that_skips_counts_what_it_left_out(tmp_path, monkeypatch, capsys):
    file = small(tmp_path / "w.safetensors", input={})
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(asset("clips/00_left.mp4"), tmp_path / name)
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    (tmp_path / "l.csv").write_text("a.mp4,0\nbad.mp4,1\nb.mp4,2\n")
    ask = ("eval", "--weights", file, "--data.val", tmp_path / "l.csv", "--test-clips", 1)
    assert "bad.mp4" in leave(monkeypatch, *ask)
    run(monkeypatch, *ask, "--data.on-error", "skip")
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["videos"] == 2 and found["unreadable"] == 1 and "bad.mp4" in said.err
    (tmp_path / "l.csv").write_text("bad.mp4,1\n")
    assert "none of the videos could be read" in leave(monkeypatch, *ask, "--data.on-error", "skip")


def test_settings_that_would_be_ignored_are_refused(tmp_path):
    tiny = recipes.read_recipe(recipe_file("umt_tiny"), PretrainUMT)
    with pytest.raises(ValueError, match="teacher_weights"):
        replace(tiny, teacher="tiny", teacher_weights="clip.pt").consistent()
    with pytest.raises(ValueError, match="label_map: needs init"):
        recipes.finetune(recipes.Finetune(out=str(tmp_path / "run"), label_map="first"))


def test_null_among_the_arguments_of_a_model_is_an_argument(tmp_path):
    (tmp_path / "p.yaml").write_text("model_args: {decoder_mask: null, depth: 1}")
    recipe = recipes.read_recipe(tmp_path / "p.yaml", PretrainVideoMAE)
    assert recipe.build(create_model).config["decoder_mask"] is None


def test_what_a_new_user_tries(tmp_path, monkeypatch, capsys):
    "Features of a folder, files that others may read, and messages that say what to change."
    file = small(tmp_path / "w.safetensors", input={})
    (tmp_path / "in").mkdir()
    shutil.copy(asset("clips/00_left.mp4"), tmp_path / "in/a.mp4")
    out = tmp_path / "f.safetensors"
    run(monkeypatch, "features", "--video", tmp_path / "in", "--weights", file, "--window", 4, "--out", out)
    assert list(load_features(out)[0]) == [str(tmp_path / "in/a.mp4")]
    (tmp_path / "plain").touch()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode
    go = ("pretrain", "videomae", "--config", "videomae_tiny", "--data.train", tmp_path / "in")
    assert "schedule.batch" in leave(monkeypatch, *go, "--out", tmp_path / "run")
    name, pre = "videomae_pretrain_vit_base_patch16", tmp_path / "p.safetensors"
    net = timm.create_model(name, **TINY, decoder_dim=32, decoder_depth=1, decoder_heads=2)
    save_weights(net, pre, {"model": name, **net.config})
    said = leave(monkeypatch, "classify", tmp_path / "in/a.mp4", "--weights", pre)
    assert "fine-tune it first" in said


# curves that leave the process

LITTLE = ("--config", "recipes/umt_tiny.yaml", "--steps", "2")


def test_a_tracker_that_is_not_installed_is_named_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "get_available_trackers", lambda: [])
    for words in (("--log", "tensorboard"), ("--log=tensorboard",)):
        said = leave(monkeypatch, "pretrain", "umt", *LITTLE, "--out", tmp_path / "run", *words)
        assert said == "vfm_lab: log: 'tensorboard' is not installed: pip install tensorboard"
    assert not (tmp_path / "run/log.jsonl").exists() and not checkpoints(tmp_path / "run")
    said = leave(monkeypatch, "pretrain", "umt", *LITTLE, "--out", tmp_path / "run", "--log", "paper")
    assert "log: expected one of" in said and "'paper'" in said


class Board(GeneralTracker):
    "Stands in for TensorBoard."
    name, requires_logging_directory, seen = "tensorboard", True, []

    def __init__(self, run_name, logging_dir, **kwargs):
        super().__init__()
        self.folder = Path(logging_dir)

    @property
    def tracker(self): return self.seen

    def store_init_configuration(self, values): pass

    def log(self, values, step, **kwargs):
        lines = (self.folder / "log.jsonl").read_text().splitlines()
        self.seen.append((step, values["loss"], len(lines)))


def test_log_sends_the_curves_from_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Board)
    for module in (loop, tracking):
        monkeypatch.setattr(module, "get_available_trackers", lambda: [LoggerType("tensorboard")])
    small = ("--model", "umt_vit_base_patch16", "--model-args", "depth", "1", "dim", "32", "heads", "2", "patch",
             "16", "image_size", "32", "frames", "4", "--data.train", "sample", "--data.frames", "4", "--data.size", "32")
    for command, words in (("pretrain", ("umt", *LITTLE)), ("finetune", (*small, "--classes", "8", "--steps", "2", "--schedule.batch", "8"))):
        Board.seen.clear()
        run(monkeypatch, command, *words, "--out", tmp_path / command, "--log", "tensorboard")
        kept = json.loads((tmp_path / command / "history.json").read_text())["loss"]
        assert [step for step, *_ in Board.seen] == [1, 2] and [loss for _, loss, _ in Board.seen] == kept
        assert Board.seen[0][2] >= 1   # what the first step said is on disk already
