import pytest
import torch

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.layout import Layout, Placed, canvas_ids, pack, unpack


def test_packing_keeps_channel_then_row_then_column():
    latents = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    tokens = pack(latents)
    assert tokens.shape == (2, 6, 12)
    assert tokens[1, 4].tolist() == latents[1, :, 2:4, 2:4].flatten().tolist()  # token 4: second row, second patch


def test_unpacking_is_the_inverse():
    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(unpack(pack(latents), 6, 10), latents)


def test_odd_latents_are_refused():
    with pytest.raises(FluxError, match="5x4"):
        pack(torch.zeros(1, 16, 5, 4))


def test_ids_are_index_row_column():
    assert canvas_ids(4, 6).tolist() == [[0, r, c] for r in range(2) for c in range(3)]
    assert canvas_ids(2, 4, index=1, row=5, column=7).tolist() == [[1, 5, 7], [1, 5, 8]]


def test_ids_above_256_stay_exact():
    assert canvas_ids(2, 602)[300].tolist() == [0, 0, 300]


def test_a_layout_names_text_canvas_and_references():
    layout = Layout(text=(3, 2), height=4, width=6, references=(Placed(2, 2, index=1, row=2),))
    ids = layout.ids()
    assert ids.shape == (5 + 6 + 1, 3)
    assert not ids[:5].any()
    assert ids[-1].tolist() == [1, 2, 0]
    tokens = torch.arange(7).reshape(1, 7, 1)
    assert layout.canvas(tokens).flatten().tolist() == [0, 1, 2, 3, 4, 5]
