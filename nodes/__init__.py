"""The nodes, in the order of their use, under ids with the prefix `FluxCanvas_`."""

from . import latent, load, sample, text
from .schema import mappings

NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    (
        load.load_flux,
        load.load_flux_parts,
        text.encode_prompt,
        latent.empty_canvas,
        latent.encode_image,
        sample.sample,
        latent.decode,
    )
)
