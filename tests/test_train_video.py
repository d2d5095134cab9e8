"""The pure pieces of emoji-wan's training: captions, rendered motions, the tracker, the video VAE, counted padding."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent.parent / "examples" / "train_demo"
MODULES = ("captions", "data", "optimizer", "video_model", "video_render", "video_scenes", "video_tracker", "video_vae")
LABELS = ("taco", "apple", "red car", "8 ball", "owl", "hat face")


@pytest.fixture(scope="module")
def demo():
    """The scripts' modules, which import each other by plain names."""
    sys.path.insert(0, str(FOLDER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder like that of data.py: a lopsided cut-out for each of a few labels in four styles."""
    folder = tmp_path_factory.mktemp("emoji")
    rows = []
    for concept, label in enumerate(LABELS):
        for style in range(4):
            picture = Image.new("RGBA", (256, 256))
            pen = ImageDraw.Draw(picture)
            colour = (40 + 30 * concept, 200 - 40 * style, 60 * style, 255)
            pen.rectangle((20, 30, 110, 236), fill=colour)
            pen.polygon([(110, 150), (236, 236), (110, 236)], fill=(20, 20, 120, 255))
            pen.ellipse((40, 50, 70, 80), fill=(250, 240, 90, 255))
            picture.save(folder / f"{concept}-{style}.webp", lossless=True)
            held_out = (concept, style) in ((1, 2), (4, 0))
            rows.append({"concept": concept, "label": label, "tags": [], "style": style, "held_out": held_out})
            rows[-1]["file"] = f"{concept}-{style}.webp"
    (folder / "pairs.json").write_text(json.dumps(rows))
    return folder


def clip_of(demo, folder: Path, motion: int, seed: int) -> np.ndarray:
    """A rendered clip of one motion, uint8 [T, H, W, 3]."""
    torch.manual_seed(seed)
    pairs = demo.data.load_pairs(folder)
    scene = demo.video_scenes.Scene(seed % len(pairs), (5 * seed) % len(pairs), motion, "")
    tokenizer = demo.captions.build_tokenizer(demo.video_scenes.build_vocabulary(pairs))
    table = demo.video_scenes.tabulate([scene], tokenizer, torch.device("cpu"))
    cutouts = demo.video_render.load_for_clips(pairs, torch.device("cpu"))
    clips = demo.video_render.draw_clips(table, torch.tensor([0]), 384, 512)
    pixels = demo.video_render.render(cutouts, clips, *demo.video_render.whole(clips))[0]
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()


BACKWARDS = {
    "left": "right",
    "right": "left",
    "up": "down",
    "down": "up",
    "clockwise": "counterclockwise",
    "counterclockwise": "clockwise",
    "grow": "shrink",
    "shrink": "grow",
    "before left": "before right",
    "before right": "before left",
    "still": "still",
    "bounce": "bounce",
}


HALF = (0, 1, 3, 5, 6, 8, 10, 11)  # with their reverses these are nearly all


@pytest.mark.parametrize("place", [i if i in HALF else pytest.param(i, marks=pytest.mark.full) for i in range(13)])
def test_the_tracker_names_each_rendered_motion_and_its_reverse(demo, pictures, place):
    seed = 17 + place
    print("seed", seed)
    motion = demo.video_scenes.MOTIONS[place].name
    clip = clip_of(demo, pictures, place, seed)
    assert demo.video_tracker.motion_of(clip) == motion
    backwards = demo.video_tracker.motion_of(np.ascontiguousarray(clip[::-1]))
    assert backwards == BACKWARDS.get(motion, backwards)
    assert motion != "passing" or backwards != "passing"


def test_a_still_thing_is_the_picture_on_white(demo, pictures):
    clip = clip_of(demo, pictures, 0, 3)
    assert (clip == clip[:1]).all()
    crop = demo.video_tracker.subject_crop(clip, "still", 128)
    pairs = demo.data.load_pairs(pictures)
    whole = demo.data.load_pictures(pairs[3:4])[0].permute(1, 2, 0).numpy()
    assert whole[0, 0].tolist() == [255, 255, 255]
    left, top, right, bottom = 20, 30, 237, 237  # of the drawn shapes
    half = 0.54 * (right - left)
    box = [(left + right) / 2 - half, (top + bottom) / 2 - half, (left + right) / 2 + half, (top + bottom) / 2 + half]
    padded = Image.fromarray(np.pad(whole, ((64, 64), (64, 64), (0, 0)), constant_values=255))
    wanted = padded.resize((128, 128), Image.Resampling.BOX, box=tuple(v + 64 for v in box))
    assert np.abs(crop.astype(float) - np.asarray(wanted)).mean() < 8


def test_captions(demo, pictures):
    scenes_of, pairs = demo.video_scenes, demo.data.load_pairs(pictures)
    left = next(m for m in scenes_of.MOTIONS if m.name == "left")
    passing = next(m for m in scenes_of.MOTIONS if m.passing)
    assert scenes_of.main_caption(pairs[0], pairs[4], left) == "a taco sliding left, noto style"
    assert scenes_of.main_caption(pairs[4], pairs[0], left) == "an apple sliding left, noto style"
    assert scenes_of.main_caption(pairs[0], pairs[4], passing) == "a taco passing an apple, noto style"
    assert scenes_of.main_caption(pairs[0], pairs[4], scenes_of.MOTIONS[0]) == "a taco, noto style"
    trained = [p for p in pairs if not p.held_out]
    tokenizer = demo.captions.build_tokenizer(scenes_of.build_vocabulary(pairs))
    scenes = scenes_of.draw_scenes(trained, 3000, seed=1)
    table = scenes_of.tabulate(scenes, tokenizer, torch.device("cpu"))
    unknown = tokenizer.convert_tokens_to_ids(demo.captions.UNK)
    for scene, tokens in zip(scenes, table.tokens, strict=True):
        assert (unknown in tokens.tolist()) == (demo.captions.UNK in scene.caption), scene.caption
        assert not trained[scene.subject].held_out
        assert trained[scene.subject].style == trained[scene.other].style
    empty = sum(s.caption == "" for s in scenes) / len(scenes)
    assert 0.07 < empty < 0.13
    assert {s.motion for s in scenes} == set(range(len(scenes_of.MOTIONS)))


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_whole_clips_code_as_the_stock_vae_does(demo, frames):
    print("seed", frames)
    torch.manual_seed(frames)
    vae = demo.video_vae.build_vae(demo.video_model.SHAPES["tiny"]).double()
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.2)
    clips = torch.rand(2, 3, frames, 48, 80, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        stock = vae.encode(clips).latent_dist
        mean, logvar = demo.video_vae.encode(vae, clips)
        decoded = demo.video_vae.decode(vae, mean.double()).clamp(-1, 1)
        wanted = vae.decode(mean.double()).sample
    assert mean.shape == (2, vae.config.z_dim, (frames + 3) // 4, 3, 5)
    assert (mean - stock.mean).abs().max() < 1e-5 * stock.mean.abs().max()
    assert (logvar - stock.logvar).abs().max() < 1e-5 * stock.logvar.abs().max()
    assert wanted.std() > 0.1
    assert (decoded - wanted).abs().max() < 1e-5


def test_counted_padding_is_the_pipelines_padding(demo):
    model_of = demo.video_model
    torch.manual_seed(5)
    model = model_of.Model(model_of.SHAPES["tiny"], 50)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    tokens = torch.randint(1, 50, (3, demo.video_scenes.LENGTH))
    for row, length in enumerate((1, 9, demo.video_scenes.LENGTH - 1)):
        tokens[row, length:] = 0
    noisy, times = torch.randn(3, 4, 3, 6, 10), torch.tensor([0.1, 0.5, 0.95])
    with torch.no_grad():
        short = model(noisy, times, tokens)
        for block in model.transformer.blocks:
            block.attn2.set_processor(type(block.attn1.processor)())
        text = model.read(tokens)
        unpadded = model.transformer(noisy, 1000 * times, text, return_dict=False)[0]
        text = F.pad(text, (0, 0, 0, model_of.TEXT_LENGTH - text.shape[1]))
        stock = model.transformer(noisy, 1000 * times, text, return_dict=False)[0]
    assert (short - stock).abs().max() < 1e-4 * stock.abs().max()
    assert (unpadded - stock).abs().max() > 1e-3 * stock.abs().max()  # so the count does matter


def test_the_optimizer_sees_kernels_as_matrices(demo):
    torch.manual_seed(0)
    vae = demo.video_vae.build_vae(demo.video_model.SHAPES["tiny"])
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    optimizer = demo.optimizer.Optimizer(vae, torch.float32, is_matrix=demo.optimizer.is_kernel)
    assert {k: v.shape for k, v in optimizer.averaged().items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(v, before[k]) for k, v in optimizer.averaged().items())
    assert sum(np.prod(s.shape) for s in optimizer.stacks) == optimizer.split
    clips = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    demo.video_vae.loss_of(vae, clips).backward()
    group = importlib.import_module("parallel").Group(0, 1, torch.device("cpu"))
    optimizer.step(group, 1.0, quantise=False)
    kernel = dict(vae.named_parameters())["decoder.conv_in.weight"]
    step = (kernel.detach() - before["decoder.conv_in.weight"]).flatten(1)
    values = torch.linalg.svdvals(step)
    assert values.min() > 0.2 * values.max()  # Muon moves all directions about as far


@pytest.mark.full
def test_the_whole_chain_in_small(pictures, tmp_path):
    """Training, export, stock loading, sampling, judging and the sheet, a few steps each."""

    def run(script: str, *args: str) -> str:
        command = [sys.executable, str(FOLDER / script), "--data", str(pictures), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    work, model, clips = str(tmp_path / "work"), str(tmp_path / "model"), str(tmp_path / "work" / "clips.npz")
    judge, sheet = str(tmp_path / "judge.safetensors"), str(tmp_path / "sheet.png")
    size = ("--vae-seconds", "1", "--vae-batch", "2", "--batch", "2", "--scenes", "64", "--seconds", "1,1,1,1")
    log = run("video_train.py", "--shape", "tiny", "--work", work, *size)
    assert "vae PSNR" in log
    run("video_export.py", "--shape", "tiny", "--work", work, "--target", model)
    pick = ("--trained-every", "3", "--limit", "3")
    run(
        "video_sample.py", "--model", model, "--target", clips, "--height", "64", "--width", "96", "--steps", "2", *pick
    )
    run("classifier.py", "--seconds", "1", "--batch", "4", "--target", judge)
    table = run("video_judge.py", clips, "--judge", judge, *pick)
    assert "| rendered | trained | 1.000 |" in table
    run("video_sheet.py", "--clips", clips, "--target", sheet, "--gifs", str(tmp_path / "gifs"))
    assert Image.open(sheet).size[0] > 800
    assert [f.name for f in (tmp_path / "gifs").iterdir()] == ["emoji-wan-left.gif"]
