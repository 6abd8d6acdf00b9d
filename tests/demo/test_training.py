"""Training: a run that is killed and resumed ends in the same bits, and what it exports loads like any checkpoint."""

import copy
import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluxcanvas.demo import WEIGHTS, train, train_flow, train_lora, train_vae
from fluxcanvas.demo.scenes import sample_scene
from fluxcanvas.demo.train_latents import SHARD, Latents, shard_scenes, write_shards
from fluxcanvas.demo.train_look import assemble
from fluxcanvas.demo.train_text import answers, lesson, new_text, stated, train_text
from fluxcanvas.demo.train_tools import Course, Muon, Plan, orthogonal
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
    return train_flow.Kitchen(train_flow.Larder(latents, DIET), text, torch.device("cpu"))


def flow(kitchen, folder: Path, until: int | None = None, workers: int = 0) -> dict[str, torch.Tensor]:
    model = train_flow.new_transformer(PARAMS, seed=2)
    plan = Plan("flow", 4, seed=3, warmup=1, save_every=1, workers=workers)
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


def test_batches_made_ahead_are_the_same(kitchen, tmp_path):
    assert same(flow(kitchen, tmp_path / "here"), flow(kitchen, tmp_path / "ahead", workers=2))


@pytest.mark.parametrize("stage", ["vae", "text", "more words", "flow", "distil", "lora"])
def test_on_another_device_a_step_mixes_nothing_and_waits_for_nothing(stage, kitchen, tmp_path, monkeypatch):
    """`meta` holds no numbers: an operation with a tensor left on the CPU fails there, and so does reading one."""
    meta, losses = torch.device("meta"), []

    def one_step(course, prepare, loss_of, *_, **__):
        losses.append(course._advance(loss_of(prepare(*course.plan.dice(0)))))
        return course.model

    monkeypatch.setattr(Course, "run", one_step)
    monkeypatch.setattr(train_flow, "half_precision", lambda _: nullcontext())  # autocast knows no such device
    monkeypatch.setattr(train_vae, "normalised", lambda model: model.params)
    plan = Plan(stage, 4, seed=3, warmup=1)
    there = replace(kitchen, text=copy.deepcopy(kitchen.text).to(meta), device=meta)
    model = train_flow.FluxTransformer(PARAMS)
    if stage == "vae":
        train_vae.train_vae(train_vae.new_vae(VAE, seed=1), plan, tmp_path, meta)
    elif stage == "flow":
        train_flow.train_flow(model, there, plan, tmp_path)
    elif stage == "distil":
        train_flow.train_distil(copy.deepcopy(model), model, there, plan, tmp_path)
    elif stage == "lora":
        train_lora.attach(model.to(meta), rank=2, seed=3)
        train_lora.train_lora(model, there, plan, tmp_path)
    else:
        train_text(there.text.requires_grad_(True), tmp_path, plan, known=stage == "more words")
    assert losses and all(loss.device == meta for loss in losses)


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
    batch = train_vae.some_crops(random.Random(4), generator)
    with torch.no_grad():
        before = train_vae.vae_loss(model, batch.pictures, batch.noise)
    plan = Plan("vae", 12, seed=1, warmup=1, save_every=6)
    train_vae.train_vae(model, plan, tmp_path, torch.device("cpu"))
    with torch.no_grad():
        after = train_vae.vae_loss(model, batch.pictures, batch.noise)
    assert after < 0.9 * before
    latents = model.encode(train_vae.held_pictures())
    normal = (latents - model.params.shift) * model.params.scale
    assert abs(normal.mean().item()) < 1e-3 and abs(normal.std().item() - 1) < 1e-3


def test_the_velocity_is_learnt_from_noise_and_picture(kitchen):
    """The question's ends: at sigma 0 it is the clean picture, at 1 pure noise, and in between the straight line."""
    meal, asked = kitchen.larder.flow(*Plan("flow", 1).dice(0))
    share = asked.sigma[:, None, None]
    assert torch.allclose(asked.noisy(meal.clean), meal.clean + share * (asked.noise - meal.clean), atol=1e-5)
    assert asked.sigma.min() > 0 and asked.sigma.max() < 1
    assert asked.guidance.min() >= 1 and asked.guidance.max() <= 5


def test_tokens_know_what_they_show():
    rng = random.Random(3)
    scenes = [sample_scene(rng) for _ in range(8)]
    found = train_flow.shown(scenes, 8)
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
    assert tuple(Latents(tmp_path, 5, 16, 1).scenes) == shard_scenes(5, 16, 0)


def test_shards_drawn_ahead_are_the_same(tmp_path):
    def encode(pictures):
        return pictures.repeat(1, 6, 1, 1)[:, :16]

    for workers in (0, 2):
        write_shards(encode, tmp_path / f"{workers}", 5, 16, 2, workers=workers)
    here, ahead = (Latents(tmp_path / name, 5, 16, 2).latents for name in ("0", "2"))
    assert torch.equal(here, ahead) and here.std() > 0.1


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


def test_a_new_transformer_beside_known_encoders(tmp_path, monkeypatch):
    """Another width than the start's; the VAE and the text encoders stay as they were."""
    command = ["train", "--work", str(tmp_path), "--scale", "try", "--new-transformer", "--steps", "text=0"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        train.main()
    monkeypatch.setattr("sys.argv", [*command, "--start", str(WEIGHTS), "--workers", "1"])
    train.main()
    made, start = (load_flux(folder, device="cpu") for folder in (tmp_path / "model", WEIGHTS))
    assert made.model.params == train.TRY.params
    assert same(made.vae.model.state_dict(), start.vae.model.state_dict())
    assert same(made.text.t5.state_dict(), start.text.t5.state_dict())


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
