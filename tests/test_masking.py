"""Masks over many grids, ratios and devices: what one notebook page cannot show."""
import pytest
import torch

from vfm_lab.tokens.masking import (ClipSeeds, attention_sampled_mask, check_dual_mask, clip_generators,
                                    dual_counts, dual_mask, frame_mask, random_mask,
                                    running_cell_mask, tube_mask, visible_count)
from vfm_lab.tokens.patching import gather_patches, gather_tokens, patchify, visible_indices

GRIDS = [(1, 2, 2), (2, 4, 6), (8, 14, 14), (3, 7, 5)]
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def attention(grid, batch=3, device="cpu"):
    t, h, w = grid
    return torch.rand(batch, t, h * w, generator=torch.Generator().manual_seed(1)).add(.01).to(device)


def make(strategy, grid, ratio, generator=None, device="cpu", batch=3):
    if strategy == "attention": return attention_sampled_mask(attention(grid, batch, device), ratio, generator=generator)
    return {"random": random_mask, "tube": tube_mask, "frame": frame_mask}[strategy](batch, grid, ratio, generator=generator, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strategy", ["random", "tube", "frame", "attention"])
@pytest.mark.parametrize("grid", GRIDS)
def test_count(strategy, grid, device):
    t, h, w = grid
    for ratio in (0, .29, .5, .75, .8, .9):
        mask = make(strategy, grid, ratio, device=device)
        hidden = {"random": int(t * h * w * ratio), "frame": int(t * ratio) * h * w}.get(strategy, t * int(h * w * ratio))
        assert mask.shape == (3, t * h * w) and mask.dtype == torch.bool and mask.device.type == device
        assert mask.sum(1).tolist() == [hidden] * 3
        assert torch.equal(visible_indices(mask), torch.stack([(~m).nonzero()[:, 0] for m in mask]))


@pytest.mark.parametrize("strategy", ["random", "tube", "frame", "attention"])
@pytest.mark.parametrize("ratio", [-.1, 1, 1.5])
def test_impossible_ratio(strategy, ratio):
    with pytest.raises(ValueError, match="ratio"): make(strategy, (2, 4, 4), ratio)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strategy", ["random", "tube", "frame", "attention"])
def test_a_cpu_generator_gives_the_same_mask_on_every_device(strategy, device):
    draw = lambda seed, dev: make(strategy, (8, 6, 6), .5, torch.Generator().manual_seed(seed), dev).cpu()
    assert torch.equal(draw(5, device), draw(5, "cpu")) and not torch.equal(draw(5, device), draw(6, "cpu"))


def test_without_a_generator_the_global_seed_decides():
    for strategy in ("random", "tube", "frame", "attention"):
        draws = []
        for seed in (0, 0):
            torch.manual_seed(seed)
            draws.append(make(strategy, (8, 6, 6), .5))
        assert torch.equal(*draws)


def test_every_choice_of_hidden_places_is_equally_likely():
    masks = random_mask(12000, (1, 2, 2), .5, generator=torch.Generator().manual_seed(0))
    codes = (masks * torch.tensor([8, 4, 2, 1])).sum(1)
    counts = torch.bincount(codes)
    counts = counts[counts > 0].float()
    assert len(counts) == 6 and ((counts - 2000) ** 2 / 2000).sum() < 20.5  # chi², 5 degrees of freedom, p = 0.001


def test_attention_sampling_has_the_law_of_successive_draws():
    a = torch.tensor([.5, .3, .2])
    kept = ~attention_sampled_mask(a.expand(20000, 1, -1), .4, generator=torch.Generator().manual_seed(0))  # hides int(1.2) = 1, keeps two
    last = (~kept).float().mean(0)  # P(i is left over) = sum over the orders of the two others
    want = torch.tensor([.3 * .2 / .7 + .2 * .3 / .8, .5 * .2 / .5 + .2 * .5 / .8, .5 * .3 / .5 + .3 * .5 / .7])
    assert (kept.sum(1) == 2).all() and (last - want).abs().max() < .015


def test_attention_may_be_half_precision_not_contiguous_and_partly_zero():
    a = attention((4, 6, 6))
    for odd in (a.half(), a.bfloat16(), a.transpose(1, 2).contiguous().transpose(1, 2)):
        assert ((~attention_sampled_mask(odd, .75)).view(3, 4, 36).sum(2) == 9).all()
    a[..., 10:] = 0
    assert not attention_sampled_mask(a, .75).view(3, 4, 36)[..., 10:].logical_not().any()  # 9 kept, all of positive attention


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [0., -.1, -1e-30, float("nan"), float("inf"), -float("inf"), 1e-60])
@pytest.mark.parametrize("where", [(0, 0), (2, 3), (slice(None), slice(None))])
def test_attention_that_cannot_be_drawn_from_is_refused_whatever_draws(bad, where, device):
    a = attention((4, 6, 6), device=device).double()
    a[where] = bad
    sources = [None, torch.Generator().manual_seed(0)]
    sources += [[torch.Generator().manual_seed(i) for i in range(3)]]
    for source in sources:
        with pytest.raises(ValueError, match="attention"):
            attention_sampled_mask(a, .75, generator=source)


@pytest.mark.parametrize("bad", [-.1, float("nan"), float("inf")])
def test_one_bad_number_is_enough(bad):
    for source in (None, [torch.Generator().manual_seed(i) for i in range(3)]):
        a = attention((4, 6, 6))
        a[1, 2, 3] = bad
        with pytest.raises(ValueError, match="attention"):
            attention_sampled_mask(a, .75, generator=source)


def test_a_place_of_attention_zero_is_never_drawn_before_another():
    a, ones = torch.zeros(1, 1, 4), torch.Generator().manual_seed(0)
    a[..., 2] = 1.
    kept = [~attention_sampled_mask(a, .75, generator=[ones])[0] for _ in range(200)]
    assert all(k.tolist() == [False, False, True, False] for k in kept)


def test_a_random_number_of_zero_draws_no_place_of_attention_zero(monkeypatch):
    monkeypatch.setattr("vfm_lab.tokens.masking._rand", lambda batch, n, *_: torch.zeros(batch, n))
    a = torch.tensor([[[0., 0., 1., 1.]]])
    assert attention_sampled_mask(a, .5, generator=[None]).tolist() == [[True, True, False, False]]


def test_the_running_cell_refuses_what_four_tokens_cannot_show():
    ratios = {n / 100 for n in range(-50, 200)} | {1 / 3, .2499999, .7500001, float("nan"), 4}
    for ratio in ratios - {.25, .5, .75}:
        with pytest.raises(ValueError, match="0.25, 0.5 or 0.75"):
            running_cell_mask(1, (2, 4, 4), ratio)
        with pytest.raises(ValueError): check_dual_mask((2, 4, 4), .5, "running_cell", ratio)


@pytest.mark.parametrize("bad", [
    dict(ratio=0.), dict(ratio=.01), dict(ratio=1.), dict(ratio=-1.), dict(grid=(2, 3, 4)),
    dict(decoder="random", decoder_ratio=0.), dict(decoder="random", decoder_ratio=1.),
    dict(decoder="frame", decoder_ratio=.4), dict(decoder="frame", decoder_ratio=1.),
    dict(decoder="random", decoder_ratio=.03), dict(decoder="tubes"), dict(decoder_ratio=.6)])
def test_a_pair_that_teaches_nothing_is_refused(bad):
    state = torch.get_rng_state()
    with pytest.raises(ValueError): check_dual_mask(**dict(grid=(2, 4, 4), ratio=.5) | bad)
    all_hidden = dict(decoder=None, decoder_ratio=7.)                 # the ratio is not used
    for good in (dict(), all_hidden, dict(decoder="frame"), dict(decoder="random")):
        check_dual_mask(**dict(grid=(2, 4, 4), ratio=.5) | good)
    assert torch.equal(torch.get_rng_state(), state)                  # asking draws nothing


@pytest.mark.parametrize("ratio", [.25, .5, .75])
def test_running_cell_is_balanced_over_any_four_slots(ratio):
    mask = running_cell_mask(8, (9, 4, 6), ratio, generator=torch.Generator().manual_seed(0)).view(8, 9, 4, 6)
    for start in range(6): assert ((~mask[:, start:start + 4]).sum(1) == 4 - 4 * ratio).all()
    assert (mask.float().mean((2, 3)) == ratio).all()


def test_gathering_before_and_after_the_cut_agree_for_every_strategy():
    clip, grid = torch.randn(3, 3, 4, 12, 20), (2, 3, 5)
    for strategy in ("random", "tube", "frame", "attention"):
        indices = visible_indices(make(strategy, grid, .5))
        assert torch.equal(gather_patches(clip, indices, 4, 2), gather_tokens(patchify(clip, 4, 2), indices))


def splitmix(seed, n):
    "Numbers of SplitMix64 as its authors write it, in Python's own whole numbers."
    def mix(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31
    return [(mix((mix(seed % 2**64) + i * 0x9E3779B97F4A7C15) % 2**64) >> 40) / 2**24 for i in range(1, n + 1)]


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_of_a_seed_are_splitmix64_on_every_device(device):
    seeds = [0, 1, 2**31, 2**62 + 7, -5]
    for given in (seeds, torch.tensor(seeds), torch.tensor(seeds, device=device)):
        source = ClipSeeds(given)
        drawn = torch.cat([source.rand(3, device), source.rand(5, device)], 1).cpu()
        assert drawn.tolist() == [splitmix(s, 8) for s in seeds]


@pytest.mark.parametrize("strategy", ["random", "tube", "frame", "attention"])
def test_a_seed_decides_its_own_clip_alone(strategy):
    same = attention((8, 6, 6), 1)

    def one(seeds):
        source, n = clip_generators({"seed": seeds}), len(seeds)
        if strategy != "attention": return make(strategy, (8, 6, 6), .5, source, batch=n)
        return attention_sampled_mask(same.expand(n, -1, -1), .5, generator=source)

    whole = one(torch.arange(40))
    assert torch.equal(one(torch.tensor([7, 30])), whole[[7, 30]])
    assert len({tuple(m) for m in whole.tolist()}) > 30
    assert clip_generators({}) is None


def test_two_masks_of_a_pair_do_not_share_their_numbers():
    seeds = torch.arange(400)
    hidden, skipped = dual_mask(400, (8, 6, 6), .5, "random", .5, generator=ClipSeeds(seeds))
    both = (hidden & skipped).float().mean().item()
    assert abs(both - .25) < .01
    again = dual_mask(400, (8, 6, 6), .5, "random", .5, generator=ClipSeeds(seeds))
    assert torch.equal(again[0], hidden) and torch.equal(again[1], skipped)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("strategy", ["random", "tube", "frame", "attention"])
def test_the_number_is_known_before_the_draw(strategy, grid):
    for ratio in (0, .29, .5, .75, .8, .9):
        mask, count = make(strategy, grid, ratio), visible_count(strategy, grid, ratio)
        assert (~mask).sum(1).tolist() == [count] * 3
        assert torch.equal(visible_indices(mask, count), visible_indices(mask))
    with pytest.raises(ValueError, match="ratio"): visible_count(strategy, grid, 1)


@pytest.mark.parametrize("decoder", [None, "running_cell", "random", "frame"])
def test_both_numbers_of_a_pair(decoder):
    for ratio, skip in ((.9, .5), (.75, .25), (.5, .75)):
        pair = dual_mask(3, (8, 6, 6), ratio, decoder, skip)
        assert [(~m).sum(1).tolist() for m in pair] == [[n] * 3 for n in dual_counts((8, 6, 6), ratio, decoder, skip)]


def test_drawing_from_attention_is_torchs_multinomial():
    a = attention((4, 7, 7), 5)
    drawn = torch.multinomial(a.flatten(0, 1), 13, generator=torch.Generator().manual_seed(2))
    mask = attention_sampled_mask(a, 36 / 49, generator=torch.Generator().manual_seed(2))
    wanted = torch.ones(20, 49, dtype=torch.bool).scatter_(1, drawn, False).view(5, -1)
    assert torch.equal(mask, wanted)
