"""Load ControlNet and Load Adapter: what they offer, what they load, and files in the wrong loader."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.model.adapters import IPAdapterNet, IPAdapterParams, ReduxEncoder
from fluxcanvas.nodes import NODE_CLASS_MAPPINGS, control, image_prompt

NET = "flux-canny-tiny.safetensors"


def save(module, path):
    """Under the published names, of which XLabs' ControlNets have one of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    renamed = {n.replace("controlnet_x_embedder", "pos_embed_input"): t for n, t in module.state_dict().items()}
    save_file({name: tensor.clone() for name, tensor in renamed.items()}, path)


def clip():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPVisionConfig(**sizes, image_size=28, patch_size=14, projection_dim=40)
    return CLIPVisionModelWithProjection(config).eval()


def siglip():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=42, patch_size=14)).eval()


@pytest.fixture
def library(tmp_path, demo, nets, randoms):
    """A models folder with a ControlNet, an IP-Adapter, Redux and both image encoders."""
    models, p = tmp_path / "models", demo.model.params
    save(nets["xlabs"].model, models / "controlnet" / NET)
    sizes = IPAdapterParams(4, p.depth, 40, p.context_in_dim, p.hidden_size)
    save(randoms(IPAdapterNet(sizes)), models / "xlabs_ipadapters" / "ip.safetensors")
    save(randoms(ReduxEncoder(32, p.context_in_dim)), models / "style_models" / "redux.safetensors")
    clip().save_pretrained(models / "clip_vision" / "clip")
    siglip().save_pretrained(models / "clip_vision" / "siglip")
    return models


def choices(node: str, name: str) -> list[str]:
    return NODE_CLASS_MAPPINGS[f"FluxCanvas_{node}"].INPUT_TYPES()["required"][name][0]


def state(node: str, **inputs) -> str:
    return NODE_CLASS_MAPPINGS[f"FluxCanvas_{node}"].IS_CHANGED(**inputs)


def test_sources_are_what_is_there_and_then_what_is_published(library):
    assert choices("LoadControlNet", "source") == [NET, *control.PUBLISHED]
    assert choices("LoadAdapter", "source") == ["redux.safetensors", "ip.safetensors", *image_prompt.PUBLISHED]
    encoders = ["clip/model.safetensors", "siglip/model.safetensors"]
    assert choices("LoadAdapter", "image_encoder") == ["auto", *encoders]


def test_a_controlnet_from_the_folder_draws_as_the_one_it_was_saved_from(
    library, run, host, draw, prompts, nets, picture
):
    (loaded,) = run("LoadControlNet", source=NET, dtype="float32")
    assert loaded.name in host.texts[-1] and host.steps[0] == (0, 100)
    samples = [
        draw(positive=run("ControlNet", conditioning=prompts[0], controlnet=net, image=picture(40, 40))[0])["samples"]
        for net in (loaded, nets["xlabs"])
    ]
    torch.testing.assert_close(*samples, rtol=1e-4, atol=1e-4)  # mapped memory is aligned otherwise


@pytest.mark.parametrize("encoder", ["auto", "{}/model.safetensors"])
@pytest.mark.parametrize(
    ("source", "eyes", "user"), [("ip", "clip", "IPAdapter"), ("redux", "siglip", "ReduxPrior")], ids=["ip", "redux"]
)
def test_adapters_find_their_eyes_and_draw(library, run, host, draw, prompts, picture, source, eyes, user, encoder):
    given = {"source": f"{source}.safetensors", "image_encoder": encoder.format(eyes)}
    (adapter,) = run("LoadAdapter", **given)
    assert source in host.texts[-1]
    (conditioned,) = run(user, conditioning=prompts[0], adapter=adapter, image=picture(60, 40))
    assert not torch.allclose(draw(positive=conditioned)["samples"], draw()["samples"], atol=1e-4)


def test_loaders_run_again_when_a_file_has_changed(library):
    before = state("LoadControlNet", source=NET), state("LoadAdapter", source="ip.safetensors", image_encoder="auto")
    (library / "controlnet" / NET).write_bytes(b"")
    (library / "clip_vision" / "new.safetensors").write_bytes(b"")
    after = state("LoadControlNet", source=NET), state("LoadAdapter", source="ip.safetensors", image_encoder="auto")
    assert before[0] != after[0] and before[1] != after[1]
    published = control.PUBLISHED[0]
    assert state("LoadControlNet", source=published) == published


@pytest.mark.parametrize(
    ("node", "inputs", "said"),
    [
        ("LoadControlNet", {"source": "gone.safetensors"}, r"'gone.safetensors' is not in .*controlnet.*put it there"),
        ("LoadControlNet", {"source": "../x"}, "is not in"),
        ("LoadAdapter", {"source": "gone"}, r"'gone' is not in .*style_models"),
        ("LoadAdapter", {"source": "ip.safetensors", "image_encoder": "gone"}, "'gone' is not in .*clip_vision"),
        ("LoadAdapter", {"source": "ip.safetensors", "image_encoder": "siglip/model.safetensors"}, "CLIP .*SigLIP"),
    ],
)
def test_what_is_not_there_or_does_not_fit_is_named(library, run, node, inputs, said):
    with pytest.raises(FluxError, match=said):
        run(node, **inputs)


def test_files_in_the_wrong_loader_say_what_they_are(library, run, nets, demo):
    save(nets["xlabs"].model, library / "style_models" / "net.safetensors")
    save(nets["xlabs"].model, library / "diffusion_models" / "net.safetensors")
    (library / "controlnet" / "redux.safetensors").write_bytes(
        (library / "style_models" / "redux.safetensors").read_bytes()
    )
    with pytest.raises(FluxError, match="ControlNet"):
        run("LoadFlux", source="net.safetensors")
    with pytest.raises(FluxError, match=r"is no IP-Adapter or Redux.*ControlNet"):
        run("LoadAdapter", source="net.safetensors")
    with pytest.raises(FluxError, match=r"is no ControlNet.*Redux"):
        run("LoadControlNet", source="redux.safetensors")


def test_interruption_stops_a_load(library, run, host):
    host.stop_at = 1
    with pytest.raises(host.Stopped):
        run("LoadControlNet", source=NET)
