"Several processes that train as one: in-batch losses, sharded towers, validation, wishes."

import json
import subprocess
import sys

import pytest
import torch
import train_toy
from safetensors.torch import load_file
from test_train import ENV, HERE, final, free_port, history
from torch.testing import assert_close

from vfm_lab.objectives.contrastive import contrastive_loss
from vfm_lab.train.resume import best_checkpoint, checkpoints

CASES = [["towers", False], ["towers", True], ["clip", False], ["captions", False]]
CASES += [["clip", True], ["captions", True]]


def together(folder, processes, **options):
    "Run train_toy.py in several processes; they have ended well."
    folder.mkdir(exist_ok=True)
    here = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), ACCELERATE_USE_CPU="true")
    here |= dict(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    command = [sys.executable, HERE / "train_toy.py", folder, json.dumps(options)]
    pipes = dict(stderr=subprocess.PIPE, text=True)
    running = [
        subprocess.Popen(command, env=ENV | here | dict(RANK=str(r), LOCAL_RANK=str(r)), **pipes)
        for r in range(processes)
    ]
    for process in running:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    train_toy.towers(folder, [case for case in CASES if not case[1]])
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def many(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("many")
    together(folder, request.param, do="towers", cases=CASES)
    return folder


@pytest.mark.parametrize("name,shard", CASES)
def test_in_batch_losses_and_their_gradients(one, many, name, shard):
    "Seven pairs on two and on four processes; two steps of plain descent tell the gradients."
    case = f"{name}_sharded" if shard else name
    alone = json.loads((one / f"{name}0.json").read_text())
    for rank in (0, 1):
        found = json.loads((many / f"{case}{rank}.json").read_text())
        for curve in set(alone) - {"seconds"}:
            assert_close(found[curve], alone[curve], atol=1e-6, rtol=1e-6)
    want = load_file(checkpoints(one / name)[-1] / "model.safetensors")
    have = load_file(checkpoints(many / case)[-1] / "model.safetensors")
    assert want.keys() == have.keys() and min(w.ndim for w in want.values()) == 0
    for key, weight in want.items():
        assert_close(have[key], weight, atol=1e-6, rtol=0)


def test_the_toy_is_no_mean_of_its_shares():
    "Else the test above would prove nothing."
    torch.manual_seed(0)
    pairs = torch.randn(2, 8, 4)
    shares = sum(contrastive_loss(*half, 3.0) for half in pairs.split(4, 1)) / 2
    assert abs(contrastive_loss(*pairs, 3.0) - shares) > 0.3


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    return folder, train_toy.judged(folder)


@pytest.mark.parametrize("processes", [2, 4])
def test_all_processes_validate_stop_and_fall_as_one(judged, tmp_path, processes):
    folder, want = judged
    together(tmp_path, processes, do="judged")
    for rank in range(processes):
        have = history(tmp_path, rank)
        assert have.keys() == want.keys()
        for curve in want.keys() - {"seconds"}:
            assert_close(have[curve], want[curve], atol=1e-4, rtol=1e-3)
    assert history(tmp_path, 1)["lr"] == history(tmp_path, 0)["lr"]
    assert min(want["lr"]) < 0.3 and len(want["loss"]) < 40
    assert best_checkpoint(tmp_path / "run").name == best_checkpoint(folder / "run").name
    for name, weight in final(folder).items():
        assert_close(final(tmp_path)[name], weight, atol=1e-3, rtol=1e-2)


KINDS = [dict(), dict(optimizer="sgd"), dict(optimizer="adam", schedule="restarts", cycle=2)]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_sharded_run_goes_on_whole_and_a_whole_one_sharded(tmp_path, options):
    "Averages of numbers that stay whole travel too, and one process may stop them all."
    whole, one, two = (tmp_path / name for name in ("whole", "one", "two"))
    for folder in (whole, one):
        folder.mkdir()
    want = train_toy.spread(whole, shard=False, **options)
    together(two, 2, do="spread", stop=3, **options)
    assert checkpoints(two / "run")[-1].name == "step_00000003"
    have = [train_toy.spread(two, shard=False, **options)]
    train_toy.spread(one, shard=False, stop=3, **options)
    together(one, 2, do="spread", **options)
    have.append(history(one, 1))
    weights = [load_file(checkpoints(f / "run")[-1] / "model.safetensors") for f in (whole, one, two)]
    for found in have:
        for curve in want.keys() - {"seconds"}:
            assert_close(found[curve], want[curve], atol=1e-6, rtol=1e-6)
    for found in weights[1:]:
        for name, weight in weights[0].items():
            assert_close(found[name], weight, atol=1e-6, rtol=0)
