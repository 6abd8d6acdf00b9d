"""The control types of union ControlNets."""

# What the first ControlNet-Union of InstantX calls its modes, in the order of its embedding; later ones keep to it.
UNION_MODES = ("canny", "tile", "depth", "blur", "pose", "gray", "low quality")
