"Verdicts on training claims: the interval against tables and scipy, three answers, and what a claim prints."
import math

import pytest

from vfm_lab.lab import claim, interval, luck, t975, told, verdict


@pytest.mark.parametrize("freedom, value", [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042),
                                            (40, 2.021), (60, 2.000), (120, 1.980), (10 ** 6, 1.960)])
def test_the_quantile_is_that_of_printed_tables(freedom, value):
    assert abs(t975(freedom) - value) < 6e-4


def test_the_quantile_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (*range(1, 40), 100, 359, 1023):
        assert abs(t975(freedom) - stats.t.ppf(0.975, freedom)) < 6e-4


def test_the_interval_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for values in ([0.008, 0.041, 0.029], [-0.2, 0.1, 0.05, 0.3, 0.0], [1.0, 0.0, 0.0, -1.0] * 20):
        error = stats.sem(values)
        low, high = stats.t.interval(0.95, len(values) - 1, sum(values) / len(values), error)
        assert interval(values) == pytest.approx((low, high), abs=1e-3 * error)


def test_three_answers():
    assert verdict([0.10, 0.12, 0.11]) is True
    assert verdict([-0.10, -0.12, -0.11]) is False
    assert verdict([0.008, 0.041, 0.029]) is None       # the right sign three times is not enough
    assert verdict([0.10, 0.12, 0.11], margin=0.1) is None
    assert verdict([0.0, 0.0, 0.0]) is None             # no difference is not better
    assert verdict([-0.01, -0.01, -0.01], margin=-0.02) is True


def test_the_luck_of_a_shared_test_set_counts_too():
    assert luck(0.5, 1024) == pytest.approx(0.0433, abs=1e-4)      # 1.96 · sqrt(0.5 / 1024)
    close = [0.010, 0.011, 0.012]                                  # five clips of 500, three times
    assert verdict(close) is True and verdict(close, noise=luck(0.5, 500)) is None
    assert verdict([-d for d in close], noise=luck(0.5, 500)) is None
    assert verdict([0.1, 0.11, 0.12], noise=luck(0.5, 500)) is True
    assert verdict([0.1, 0.11, 0.12], margin=0.1, noise=luck(0.5, 500)) is None


def test_one_run_decides_nothing():
    assert interval([0.5]) == (-math.inf, math.inf) and verdict([0.5]) is None
    assert "n = 1" in told([0.5])


@pytest.mark.parametrize("values", [[], [0.1, math.nan], [math.inf, 0.1]])
def test_what_cannot_be_judged_is_refused(values):
    with pytest.raises(ValueError, match="finite"): verdict(values)


def test_what_a_claim_prints(capsys, monkeypatch):
    monkeypatch.setenv("VFM_LAB_BUDGET", "full")
    for holds in (True, False, None): claim(holds, "text")
    assert capsys.readouterr().out.splitlines() == ["✓ holds: text", "✗ fails at this scale: text",
                                                    "≈ too close to call: text"]
    monkeypatch.setenv("VFM_LAB_BUDGET", "smoke")
    for holds in (True, False, None): claim(holds, "text")
    assert set(capsys.readouterr().out.splitlines()) == {"– not judged in a smoke run: text"}
