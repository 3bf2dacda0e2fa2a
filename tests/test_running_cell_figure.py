"The drawing of the running cell shows what the official code does, in four slots."
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from vfm_lab.viz.running_cell import DECODER_TONES, running_cell_figure

# 1 = not decoded: the cells of the official maps, phase 0, slots 0 to 3
OFFICIAL = [[[1, 0], [0, 1]], [[0, 0], [1, 1]], [[0, 1], [1, 0]], [[1, 1], [0, 0]]]


def squares(figure):
    "The queue's squares and the frame's, each as 1 = grey, from left to right, from top to bottom."
    patches = [p for p in figure.axes[0].patches if isinstance(p, Rectangle) and p.get_width() == 1]
    patches.sort(key=lambda p: (p.get_x() // 5.6, -p.get_y(), p.get_x()))
    grey = DECODER_TONES[1].lower()
    queue = [int(to_hex(p.get_facecolor()) == grey) for p in patches if p.get_y() > 5]
    frame = [int(to_hex(p.get_facecolor()) == grey) for p in patches if p.get_y() < 5]
    return queue, frame


def test_cells_are_the_official_ones():
    for phase in range(4):
        queue, frame = squares(running_cell_figure(0.5, phase))
        assert queue[:4] == [1, 1, 0, 0]
        for slot in range(4):
            cell = OFFICIAL[(slot + phase) % 4]                 # phase s begins at column s of the table
            rows = [cell[row % 2] * 2 for row in range(4)]      # two cells beside, two below each other
            assert frame[16 * slot:16 * slot + 16] == sum(rows, [])
            assert queue[4 * slot + 4:4 * slot + 8] == sum(cell, [])


def test_words_and_legend_say_what_the_colours_mean():
    figure = running_cell_figure()
    words = [t.get_text() for t in figure.axes[0].texts]
    followed = [w.removeprefix("blue place: ") for w in words if w.startswith("blue")]
    assert followed == ["decoded", "decoded", "left out", "left out"]
    legend = [t.get_text() for t in figure.legends[0].get_texts()]
    assert legend[:2] == ["decoded", "not decoded"]


@pytest.mark.parametrize("ratio", (0.0, 0.4, 0.6, 1.0, 0.2500001))
def test_other_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match="0.25, 0.5 or 0.75"): running_cell_figure(ratio)
