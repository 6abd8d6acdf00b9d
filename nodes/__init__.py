"""The nodes, in the order of their use, under ids with the prefix `FluxCanvas_`."""

from . import control, edit, image_prompt, latent, load, lora, masks, preprocess, quant, report, sample, text
from .schema import mappings

NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    (
        load.load_flux,
        load.load_flux_parts,
        control.load_control_net,
        image_prompt.load_adapter,
        lora.load_lora,
        lora.lora_stack,
        lora.apply_lora,
        quant.quantize,
        quant.save_model,
        report.model_report,
        text.encode_prompt,
        text.combine_conditioning,
        text.region_prompt,
        control.control_net,
        control.control_image,
        image_prompt.redux_prior,
        image_prompt.ip_adapter,
        edit.kontext_condition,
        edit.kontext_canvas,
        edit.fill_condition,
        masks.inpaint_mask,
        masks.mask_edit,
        masks.combine_masks,
        masks.crop_for_inpaint,
        masks.stitch_back,
        masks.pad_for_outpaint,
        preprocess.canny_map,
        preprocess.depth_map,
        preprocess.integrity_check,
        latent.empty_canvas,
        latent.encode_image,
        sample.sample,
        latent.decode,
    )
)
