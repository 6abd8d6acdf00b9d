"""Training: a run that is killed and resumed ends in the same bits, and what it exports loads like any checkpoint."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluxcanvas.demo import train, train_flow, train_lora, train_vae
from fluxcanvas.demo.scenes import sample_scene
from fluxcanvas.demo.train_latents import SHARD, Latents, shard_scenes, write_shards
from fluxcanvas.demo.train_look import assemble
from fluxcanvas.demo.train_text import answers, lesson, new_text, stated
from fluxcanvas.demo.train_tools import Muon, Plan, orthogonal
from fluxcanvas.flux_runtime import load_flux, load_lora, text_to_image
from fluxcanvas.flux_runtime.model.vae import AutoEncoder, VaeParams
from fluxcanvas.flux_runtime.variants import FluxParams

PARAMS = FluxParams(
    vec_in_dim=128,
    context_in_dim=128,
    hidden_size=32,
    num_heads=1,
    mlp_hidden=64,
    depth=1,
    depth_single=1,
    axes_dim=(4, 14, 14),
)
VAE = VaeParams(channels=(8, 8, 8, 8), num_res_blocks=1, groups=1, scale=0.9, shift=0.1, sample_size=64)
DIET = replace(train_flow.Diet(), sizes=(64, 96), batches=(4, 2), lengths=(16, 24, 32))


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory) -> train_flow.Kitchen:
    """Batches from latents of noise: what is learnt does not matter here."""
    folder = tmp_path_factory.mktemp("latents")
    generator = torch.Generator().manual_seed(0)
    for size in DIET.sizes:
        write_shards(
            lambda pictures: torch.randn(
                len(pictures), 16, pictures.shape[2] // 8, pictures.shape[3] // 8, generator=generator
            ),
            folder,
            1,
            size,
            1,
        )
    latents = {size: Latents(folder, 1, size, 1) for size in DIET.sizes}
    text = new_text(1, captions=400).eval().requires_grad_(False)
    return train_flow.Kitchen(latents, text, DIET, torch.device("cpu"))


def flow(kitchen, folder: Path, until: int | None = None, steps: int = 4) -> dict[str, torch.Tensor]:
    model = train_flow.new_transformer(PARAMS, seed=2)
    plan = Plan("flow", steps, seed=3, warmup=1, save_every=1)
    train_flow.train_flow(model, kitchen, plan, folder, until=until)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_resumed_flow_equals_an_uninterrupted_one_bit_for_bit(kitchen, tmp_path):
    whole = flow(kitchen, tmp_path / "whole")
    halted = flow(kitchen, tmp_path / "halted", until=2)
    (tmp_path / "halted" / "flow-state.part").write_bytes(b"what a kill in the middle of saving leaves")
    resumed = flow(kitchen, tmp_path / "halted")
    assert same(whole, resumed)
    assert not same(whole, halted)
    assert not same(whole, dict(train_flow.new_transformer(PARAMS, seed=2).state_dict()))


def test_a_resumed_distillation_equals_an_uninterrupted_one(kitchen, tmp_path):
    def distil(folder: Path, until: int | None = None) -> dict[str, torch.Tensor]:
        student = train_flow.new_transformer(PARAMS, seed=2)
        teacher = train_flow.FluxTransformer(PARAMS)  # one that says something: the seed has just been set
        plan = Plan("distil", 3, seed=3, warmup=1, save_every=1)
        train_flow.train_distil(teacher, student, kitchen, plan, folder, until=until)
        return dict(student.state_dict())

    whole = distil(tmp_path / "whole")
    halted = distil(tmp_path / "halted", until=1)
    assert not same(whole, halted)
    assert same(whole, distil(tmp_path / "halted"))


def test_training_lowers_the_loss_of_the_vae(tmp_path):
    model = train_vae.new_vae(VAE, seed=1)
    generator = torch.Generator().manual_seed(0)
    pictures = train_vae.crops(random.Random(4), 4)
    with torch.no_grad():
        before = train_vae.vae_loss(model, pictures, generator)
    plan = Plan("vae", 12, seed=1, warmup=1, save_every=6)
    train_vae.train_vae(model, plan, tmp_path, torch.device("cpu"))
    with torch.no_grad():
        after = train_vae.vae_loss(model, pictures, generator)
    assert after < 0.9 * before
    latents = model.encode(train_vae.held_pictures())
    normal = (latents - model.params.shift) * model.params.scale
    assert abs(normal.mean().item()) < 1e-3 and abs(normal.std().item() - 1) < 1e-3


def test_the_velocity_is_learnt_from_noise_and_picture(kitchen):
    """The question's ends: at sigma 0 it is the clean picture, at 1 pure noise, and in between the straight line."""
    rng, generator = Plan("flow", 1).dice(0)
    meal = kitchen.meal(rng, empty=0.5)
    asked = train_flow.Question.about(meal, generator)
    share = asked.sigma[:, None, None]
    assert torch.allclose(asked.noisy, meal.clean + share * (asked.noise - meal.clean), atol=1e-5)
    assert asked.sigma.min() > 0 and asked.sigma.max() < 1
    assert asked.guidance.min() >= 1 and asked.guidance.max() <= 5


def test_tokens_know_what_they_show():
    rng = random.Random(3)
    scenes = [sample_scene(rng) for _ in range(8)]
    found = train_flow.shown(scenes, 8, torch.device("cpu"))
    for index, scene in enumerate(scenes):
        kinds = set(found.kind[index].tolist()) - {train_flow.NOTHING}
        assert kinds <= {train_flow.KINDS.index(thing.kind) for thing in scene.things}
        last = scene.things[-1]
        cell = int(last.y * 8) * 8 + int(last.x * 8)
        assert found.kind[index, cell] == train_flow.KINDS.index(last.kind)
        assert found.place[index, cell].abs().max() <= 1


def test_shards_are_found_again_and_not_written_twice(tmp_path):
    calls = []

    def encode(pictures):
        calls.append(len(pictures))
        return torch.zeros(len(pictures), 16, 2, 2)

    write_shards(encode, tmp_path, 5, 16, 1)
    write_shards(encode, tmp_path, 5, 16, 1)
    assert sum(calls) == SHARD
    assert Latents(tmp_path, 5, 16, 1).scenes == shard_scenes(5, 16, 0)


def test_lessons_ask_only_for_what_is_there():
    task = lesson(random.Random(2), 16)
    assert task.answers.shape == task.stated.shape == (16, 2 + 12 * 5)
    assert bool((task.answers[task.stated] >= 0).all())
    scene = sample_scene(random.Random(9))
    assert len(answers(scene)) == len(stated(lesson_facts(scene)))


def lesson_facts(scene):
    from fluxcanvas.demo.captions import caption

    return caption(scene, random.Random(1)).facts


def test_muon_makes_updates_orthogonal():
    matrix = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.5 and values.max() < 1.5
    layer = torch.nn.Linear(8, 24)
    Muon(layer.named_parameters(), 0.1, 0.1, lambda name: True).step(1.0)
    assert layer.weight.grad is None


def test_what_is_exported_loads_through_the_loader(kitchen, tmp_path):
    from fluxcanvas.demo.train_export import export

    torch.manual_seed(0)
    transformer, vae = train_flow.FluxTransformer(PARAMS), AutoEncoder(VAE)
    export(tmp_path, transformer, vae, kitchen.text, tokens=24)
    flux = load_flux(tmp_path, device="cpu", dtype=torch.float32)
    assert flux.text.default_tokens == 24
    assert flux.vae.params == VAE and flux.model.params == PARAMS
    for ours, theirs in (
        (transformer, flux.transformer),
        (vae, flux.vae.model),
        (kitchen.text.t5, flux.text.t5),
        (kitchen.text.clip, flux.text.clip),
    ):
        loaded = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            assert torch.equal(loaded[name].float(), parameter.detach().bfloat16().float()), name
    (image,) = text_to_image(flux, "a red house", steps=1, seed=1)
    assert image.size == (64, 64)


def test_a_stage_that_is_done_is_not_done_again(tmp_path):
    run = train.Training(tmp_path, train.CPU, 1, torch.device("cpu"))
    vae = AutoEncoder(replace(train_vae.TINY, scale=0.8, shift=0.2))
    train.store(vae, tmp_path / "vae.safetensors", {"scale": 0.8, "shift": 0.2})
    run.run(("vae",))
    assert run.vae().params == vae.params
    assert same(dict(vae.state_dict()), dict(run.vae().state_dict()))


def test_one_command_goes_through_all_stages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "--work", str(tmp_path), "--scale", "try", "--tokens", "24"])
    train.main()
    said = capsys.readouterr().out
    assert all(f"{stage}: begins" in said for stage in train.STAGES)
    assert "flow: step 4 of 4" in said and "understood: T5" in said and "64 px: background" in said
    assert {path.name for path in tmp_path.glob("*.png")} >= {"flow-000004-64.png", "distil-000004-32.png"}
    flux = load_flux(tmp_path / "model", device="cpu")
    assert flux.model.params == train.TRY.params and flux.text.default_tokens == 24
    train.main()
    assert "flow: step" not in capsys.readouterr().out  # what is done is not done again


def speaking() -> train_flow.FluxTransformer:
    """A transformer whose blocks and output are not silent, always the same one."""
    torch.manual_seed(2)
    return train_flow.FluxTransformer(PARAMS).eval()


def lora(kitchen, folder: Path, until: int | None = None) -> tuple[torch.nn.Module, dict[str, train_lora.LowRank]]:
    """Three steps of a LoRA on `speaking` weights."""
    model = speaking()
    changes = train_lora.attach(model, rank=2, seed=3)
    plan = Plan("lora", 3, seed=3, warmup=1, save_every=1)
    return train_lora.train_lora(model, kitchen, plan, folder, until), changes


def test_a_resumed_lora_equals_an_uninterrupted_one_and_leaves_the_model_as_it_was(kitchen, tmp_path):
    whole, _ = lora(kitchen, tmp_path / "whole")
    halted, _ = lora(kitchen, tmp_path / "halted", until=1)
    assert not same(whole.state_dict(), halted.state_dict())
    resumed, changes = lora(kitchen, tmp_path / "halted")
    assert same(whole.state_dict(), resumed.state_dict())
    before, layers = speaking().state_dict(), dict(resumed.named_modules())
    assert len(changes) == 8 + 2
    for name, change in changes.items():
        assert torch.equal(layers[name].parametrizations.weight.original, before[f"{name}.weight"])
        assert change.up.abs().max() > 0
    after = resumed.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name in after)


def test_a_saved_lora_does_to_the_model_what_it_did_in_training(kitchen, tmp_path):
    trained, changes = lora(kitchen, tmp_path)
    with torch.no_grad():
        for change in changes.values():
            change.up.mul_(30)  # so that it shows
            for factor in (change.up, change.down):
                factor.copy_(factor.bfloat16())
    train_lora.save_lora(tmp_path / "print.safetensors", changes)
    vae = AutoEncoder(VAE)
    plain = assemble(speaking(), vae, kitchen.text)
    settings = {"seed": 1, "steps": 2, "width": 64, "height": 64, "max_sequence_length": 24, "output": "latent"}
    wanted = text_to_image(assemble(trained, vae, kitchen.text), "a red house", **settings)
    assert not torch.allclose(text_to_image(plain, "a red house", **settings), wanted, rtol=1e-2)
    found = text_to_image(plain.with_loras(load_lora(tmp_path / "print.safetensors")), "a red house", **settings)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
