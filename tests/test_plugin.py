"A system in a file of its own is found by everything, without any edit of the package."
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import vfm_lab
from vfm_lab import cli
from vfm_lab.config import RECIPES
from vfm_lab.golden import RUNNERS
from vfm_lab.hub import GROUP, Loaded, plugin, save
from vfm_lab.inputs import InputSpec
from vfm_lab.lab import asset
from vfm_lab.models.registry import LAYOUTS
from vfm_lab.recipes import open_towers
from vfm_lab.tasks.features import load_features
from vfm_lab.text import word_tokenizer
from vfm_lab.viz.attention import attention_map, record_attention

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "tests/plugins/toy.py"


@pytest.fixture(scope="module")
def toy():
    "The declarations of the file; they are taken back, other tests count what there is."
    plugin(TOY)
    yield sys.modules["vfm_lab_plugin_toy"]
    for table in (RECIPES, RUNNERS, LAYOUTS):
        for name in [n for n in table if "toy" in n]:
            table.pop(name)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["vfm_lab", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code, caught.value.code


def test_load(toy, tmp_path):
    assert {"toy_classifier", "toy_encoder", "toy_adapted"} <= {*vfm_lab.list_models("toy*")}
    model = vfm_lab.create_model("toy_classifier", num_classes=5)
    torch.save({"state_dict": toy.to_toy(model.state_dict())}, tmp_path / "theirs.pth")
    found = vfm_lab.load(tmp_path / "theirs.pth")
    assert found.name == "toy_classifier" and found.spec == InputSpec(4, 32, "half", "dense")
    clip = torch.rand(2, 3, 4, 32, 32)
    assert torch.equal(found.model(clip), model.eval()(clip)) and found.report.clean


def test_commands(toy, tmp_path, monkeypatch, capsys):
    "Pre-training, fine-tuning from it, a test, features, an adapter from the result."
    pre, post = tmp_path / "pre", tmp_path / "post"
    train = ("--data.train", "sample", "--data.frames", 4, "--data.size", 32, "--steps", 2, "--schedule.batch", 8)
    run(monkeypatch, "pretrain", "toy", *train, "--drop", 0.25, "--out", pre)
    tuned = (*train, "--data.val", "sample", "--classes", 8, "--test-clips", 1, "--test-crops", 1)
    run(monkeypatch, "finetune", "--model", "toy_classifier", *tuned, "--out", post, "--init", pre / "model.safetensors")
    assert "fresh 4" in capsys.readouterr().out
    run(monkeypatch, "eval", "--config", post / "config.yaml")
    again = json.loads(capsys.readouterr().out)
    assert again == {k: v for k, v in json.loads((post / "result.json").read_text()).items() if k in again}
    file = tmp_path / "f.safetensors"
    run(monkeypatch, "features", "--video", asset("clips/moments.mp4"), "--weights", post / "model.safetensors", "--window", 8, "--out", file)
    (one,) = load_features(file)[0].values()
    assert one["features"].shape[1] == 32
    run(monkeypatch, "finetune", "--model", "toy_adapted", *tuned, "--out", tmp_path / "adapted", "--init", post / "model.safetensors")
    before, after = (vfm_lab.load(p / "model.safetensors").model for p in (post, tmp_path / "adapted"))
    assert torch.equal(before.blocks[0].attn.qkv.weight, after.blocks[0].attn.qkv.weight)
    assert not torch.equal(after.blocks[1].detour[2].bias, torch.zeros(32))


def test_parity(toy, tmp_path, monkeypatch, capsys):
    model, clip = vfm_lab.create_model("toy_classifier").eval(), torch.rand(2, 3, 4, 32, 32)
    tensors = {f"weights.{k}": v for k, v in toy.to_toy(model.state_dict()).items()}
    with torch.no_grad():
        tensors |= {"inputs.clip": clip, "outputs.logits": model(clip)}
    save_file(tensors, tmp_path / "toy.safetensors")
    about = dict(system="toy", config=dict(num_classes=3, batch=2), tolerance=dict(atol=1e-6, rtol=0))
    (tmp_path / "toy.json").write_text(json.dumps(about))
    run(monkeypatch, "parity", tmp_path, "--strict")
    assert "1 of 1 cases met" in capsys.readouterr().out
    about["config"]["depth"] = 7   # a setting that the runner does not look at
    (tmp_path / "toy.json").write_text(json.dumps(about))
    monkeypatch.setattr(sys, "argv", ["vfm_lab", "parity", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1 and "depth=7" in capsys.readouterr().out


def test_search(toy, tmp_path, monkeypatch, capsys):
    "Whatever embeds videos and texts is searched with; padding does not change a vector."
    words = word_tokenizer(["<pad>", "<start>", *(f"w{i}" for i in range(2, 19)), "<end>"])
    file = tmp_path / "towers.safetensors"
    model = vfm_lab.create_model("toy_towers")
    save(Loaded(model, name="toy_towers"), file)
    ask = ("search", "w2", "--videos", asset("clips/tour.mp4"), asset("clips/moments.mp4"), "--weights", file,
           "--index", tmp_path / "i.safetensors")
    (tmp_path / "words.json").write_text(words.to_str())
    run(monkeypatch, *ask, "--tokenizer", tmp_path / "words.json")
    assert capsys.readouterr().out.count(".mp4") == 2
    towers = open_towers(file, tmp_path / "words.json")
    assert (towers.frames, towers.size, towers.vocab, towers.context) == (4, 32, 20, None)
    torch.testing.assert_close(towers.texts(["w2", "w3 w4 w5 w6"])[0], towers.texts(["w2"])[0])
    (tmp_path / "words.json").write_text(word_tokenizer([f"w{i}" for i in range(21)]).to_str())
    for words, said in ((("--tokenizer", tmp_path / "words.json"), "the tower knows 20"), ((), "brings no tokenizer"),
                        (("--weights", "toy_towers"), "without weights"), (("--weights", "umt_vit_base_patch16"), "without weights")):
        monkeypatch.setattr(sys, "argv", [str(w) for w in ("vfm_lab", *ask, *words)])
        with pytest.raises(SystemExit, match=said):
            cli.main()


@pytest.mark.parametrize("name", ["toy_classifier", "toy_adapted"])
def test_attention(toy, name):
    model = vfm_lab.create_model(name)
    record = record_attention(model, torch.rand(3, 4, 32, 32))
    assert record.layers == 2 and attention_map(record, query=9).shape == (4, 4, 4)


def test_option_and_entry_point(tmp_path):
    "In processes of their own: `--plugin`, and an installed package with an entry point."
    def said(*words, **env):
        done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=tmp_path,
                              env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": ""})
        return done.stdout + done.stderr
    assert "--drop" in said("-m", "vfm_lab.cli", "--plugin", TOY, "pretrain", "toy", "--help")
    assert "no such file" in said("-m", "vfm_lab.cli", "--plugin", "no.py", "doctor")
    (tmp_path / "toy_package.py").write_text(TOY.read_text())
    meta = tmp_path / "toy_package-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text(f"[{GROUP}]\ntoy = toy_package\n")
    assert "toy_adapted" in said("-c", "import vfm_lab; print(vfm_lab.list_models('toy*'))")


def test_shared_code_names_no_system(tmp_path, monkeypatch):
    "The command that counts says 0, and it sees what it should: words, strings, imports, exported names; no prose."
    done = subprocess.run([sys.executable, ROOT / "tools/law.py"], capture_output=True, text=True)
    assert not done.returncode, done.stdout
    assert done.stdout.startswith("0 lines of 4"), done.stdout
    monkeypatch.syspath_prepend(ROOT / "tools")
    import law
    assert {"recipes", "cli", "hub", "tasks/retrieval", "viz/attention", "models/checkpoints"} <= {law.place(f) for f in law.shared()}
    text = '''"""As in UMT."""
import x  # like VideoMAE
if kind == "umt": pass
from .models.clip import tokenize
def f(): "UMT's own"
net = {"a": "videomae_vit"}, CLIPVision, clip
'''
    word, module = law.names()
    said = [n for n, line in enumerate(law.code(text), 1) if word.search(line) or module.search(line)]
    assert said == [3, 4, 6]
