"""What tests of packed modules share."""

import pytest
import torch

from fluxcanvas.flux_runtime.quant.packed import Packed


def _bits(module):
    """All that a module holds: by name the bytes, and of packed weights the scheme."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    held = {name: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8)) for name, t in tensors.items()}
    return held, {name: m.scheme for name, m in module.named_modules() if isinstance(m, Packed)}


def _same(a, b):
    (left, schemes), (right, others) = _bits(a), _bits(b)
    assert schemes == others and left.keys() == right.keys()
    for name, (dtype, shape, data) in left.items():
        assert (dtype, shape) == right[name][:2], name
        assert torch.equal(data, right[name][2]), name


@pytest.fixture(scope="session")
def same():
    """`same(a, b)`: fails unless two modules hold the same bytes under the same names and schemes."""
    return _same
