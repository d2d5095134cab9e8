"""The pure pieces of emoji-flux's training: words that do not ship, further concepts, pictures it drew itself."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

FOLDER = Path(__file__).parent.parent / "examples" / "train_demo"
MODULES = ("captions", "data", "dream", "export", "guide", "model", "optimizer", "parallel", "restyle", "train")
KNOWN, FURTHER, TOKENS, CHANNELS, VIEWS = 6, 8, 3, 2, 3


@pytest.fixture(scope="module")
def demo():
    """The scripts' modules, which import each other by plain names."""
    sys.path.insert(0, str(FOLDER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path.remove(str(FOLDER))


def pair(demo, concept: int, label: str, style: int, held_out: bool = False, extra: bool = False):
    return demo.data.Pair(concept, label, ("round",), style, held_out, Path("none"), extra)


def data_of(demo):
    """Six known pictures (two things, one style of each held out), eight of further concepts in three views.

    Every latent holds its place in the table, so that what is fetched shows where it lay.
    """
    pairs = [pair(demo, c, label, s, held_out=s == c) for c, label in enumerate(("taco", "owl")) for s in range(4)]
    further = [pair(demo, c, label, s, extra=True) for c, label in enumerate(("tram", "tent")) for s in range(4)]
    trained, missing = [p for p in pairs if not p.held_out] + further, [p for p in pairs if p.held_out]
    count = KNOWN + VIEWS * FURTHER
    latents = {128: torch.arange(count).float()[:, None, None].expand(count, TOKENS, CHANNELS)}
    vocabulary = demo.captions.build_vocabulary(pairs, further)
    group = demo.parallel.Group(0, 1, torch.device("cpu"))
    return demo.train.build_data(trained, missing, vocabulary, "style", latents, group), missing


def test_words_of_further_concepts_come_last(demo) -> None:
    pairs, further = [pair(demo, 0, "red taco", 0)], [pair(demo, 0, "blue taco", 0, extra=True)]
    alone, both = demo.captions.build_vocabulary(pairs), demo.captions.build_vocabulary(pairs, further)
    assert {word: both[word] for word in alone} == alone
    assert set(both) - set(alone) == {"blue"}
    assert both["blue"] == len(alone)


def test_further_concepts_are_named_in_the_main_caption_only(demo) -> None:
    told = demo.captions.variants(pair(demo, 0, "taco", 1, extra=True), seed=3)
    free = told[demo.captions.FREE :]
    assert told[0] == "taco, twemoji style"
    assert not any("taco" in text for text in free)
    assert all(demo.captions.UNK in text and "twemoji" in text for text in free)
    known = demo.captions.variants(pair(demo, 0, "taco", 1), seed=3)
    assert all("taco" in text for text in known[demo.captions.FREE :])


def test_export_cuts_embeddings_to_the_words_that_ship(demo) -> None:
    weights = {"t5.shared.weight": torch.rand(9, 4), "t5.block.weight": torch.rand(9, 4), "clip.x": torch.rand(2)}
    own = demo.export.part(weights, "t5.", 5)
    assert own["shared.weight"].equal(weights["t5.shared.weight"][:5])
    assert own["block.weight"].equal(weights["t5.block.weight"])
    assert set(own) == {"shared.weight", "block.weight"}


def test_new_words_keep_their_first_values(demo) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(7, 4)
    first = embedding.weight.detach().clone()
    optimizer = demo.optimizer.Optimizer(embedding, torch.float32)
    optimizer.load_averaged({"weight": torch.full((5, 4), 2.0)})
    for weights in (embedding.weight, optimizer.averaged()["weight"]):
        assert weights[:5].eq(2).all()
        assert weights[5:].equal(first[5:])


def test_every_picture_is_fetched_from_its_own_place(demo) -> None:
    data, _ = data_of(demo)
    assert (data.known, data.pictures, data.views) == (KNOWN, KNOWN + FURTHER, VIEWS)
    assert len(data.clip_tokens) == len(data.t5_tokens) == KNOWN + FURTHER + 2  # and the two without a picture
    places = torch.tensor([0, 5, 6, 13, 6, 13])
    found = data.clean(128, places, torch.tensor([2, 1, 0, 0, 2, 1]))  # known pictures have one view only
    assert found[:, 0, 0].tolist() == [0, 5, 6, 13, 6 + 2 * FURTHER, 13 + FURTHER]


def test_dreams_lie_after_all_pictures_with_their_captions(demo, tmp_path: Path) -> None:
    data, missing = data_of(demo)
    drawn = torch.full((3, TOKENS, CHANNELS), 100.0) + torch.arange(3)[:, None, None]
    order = [missing[1], missing[0], missing[1]]
    save_file(
        {"pairs": torch.tensor([(p.concept, p.style) for p in order]), "128": drawn.half()}, tmp_path / "d.safetensors"
    )
    made = demo.train.with_dreams(data, missing, tmp_path / "d.safetensors")
    first = data.pictures
    assert len(made.clip_tokens) == len(made.t5_tokens) == len(made.others) == first + 3
    assert made.clip_tokens[first:].equal(data.clip_tokens[[first + 1, first, first + 1]])
    assert made.t5_tokens[first:].equal(data.t5_tokens[[first + 1, first, first + 1]])
    assert not made.t5_tokens[first].equal(made.t5_tokens[first + 1])
    places = torch.arange(first, first + 3)
    for view in range(VIEWS):  # whichever view was drawn
        assert made.clean(128, places, torch.full((3,), view))[:, 0, 0].tolist() == [100, 101, 102]
    assert set(made.others[first].tolist()) <= {3, 4, 5}  # the owl's real pictures
    torch.manual_seed(0)
    assert demo.train.draw_pairs(made, 2000, dream=False).max() < first
    assert set(range(first, first + 3)) <= set(demo.train.draw_pairs(made, 2000, dream=True).tolist())


@pytest.mark.parametrize(
    ("rule", "at", "expected"),
    [
        ("none", 0.95, (1, 0, 0, 0)),
        ("style 3", 0.95, (3, -2, 0, 0)),
        ("style 3 below 0.9", 0.95, (1, 0, 0, 0)),
        ("style 3 below 0.9", 0.5, (3, -2, 0, 0)),
        ("thing above 0.7, style 1.5", 0.8, (0, 1, 0, 0)),
        ("thing above 0.7, style 1.5", 0.6, (1.5, -0.5, 0, 0)),
        ("style 2, unnamed below 0.5", 0.4, (0, 0, 2, -1)),
        ("unnamed below 0.5", 0.6, (1, 0, 0, 0)),
    ],
)
def test_rules_of_guidance(demo, rule: str, at: float, expected: tuple[float, ...]) -> None:
    places = {(True, True): 0, (False, True): 1, (True, False): 2, (False, False): 3}  # styled, named
    found = demo.guide.rule_of(rule)(at, lambda styled, named: torch.eye(4)[places[styled, named]])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_a_rule_that_is_none_is_refused(demo) -> None:
    with pytest.raises(SystemExit, match=r"style 1\.6"):
        demo.guide.rule_of("stile 3")


def test_dreams_take_other_noise_and_the_other_styles_in_turn(demo) -> None:
    below = torch.tensor([[1, 2, 3], [5, 6, 7]])
    dreams = demo.dream.dreams_of(below, ["none", "style 2"], [1.0, 0.7], each=4, seed=3)
    assert len(dreams) == 2 * 2 * 4 * 2
    assert len({one.seed for one in dreams}) == len(dreams)
    assert [one.below for one in dreams if (one.pair, one.rule, one.start) == (1, "style 2", 0.7)] == [5, 6, 7, 5]
    assert demo.dream.dreams_of(below, ["none", "style 2"], [1.0, 0.7], each=4, seed=3) == dreams


def test_the_surest_dreams_of_each_pair_are_kept(demo) -> None:
    dreams = demo.dream.dreams_of(torch.tensor([[0], [0], [0]]), ["none"], [1.0], each=3, seed=0)
    worth = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.2, 0.4, 0.3, 0.8, 0.6])  # three pairs in turn
    assert demo.dream.best(dreams, worth, 2) == [3, 6, 1, 7, 8, 2]
    assert [dreams[i].pair for i in demo.dream.best(dreams, worth, 9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_surety_is_the_probability_of_thing_and_style(demo) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]), torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 4.0]])
    pairs = [pair(demo, 1, "owl", 0), pair(demo, 2, "tram", 3)]
    found = demo.dream.surety([lambda _: logits], torch.zeros(2, 3, 256, 256), pairs)
    expected = [
        float(a.softmax(-1)[p.concept] * b.softmax(-1)[p.style]) for a, b, p in zip(*logits, pairs, strict=True)
    ]
    assert found.exp().tolist() == pytest.approx(expected)
    unsure = torch.zeros(2, 3), torch.zeros(2, 4)
    both = demo.dream.surety([lambda _: logits, lambda _: unsure], torch.zeros(2, 3, 256, 256), pairs)
    assert both.exp().tolist() == pytest.approx([(one / 12) ** 0.5 for one in expected])  # the geometric mean
    assert not demo.dream.surety([], torch.zeros(2, 3, 256, 256), pairs).any()


def test_noised_leads_from_whatever_is_below_to_the_picture(demo) -> None:
    torch.manual_seed(0)
    x0, seen, times = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.tensor([0.5, 0.8, 1.0])
    noisy, velocity = demo.train.noised(x0, seen, times)
    torch.testing.assert_close(noisy - times[:, None, None] * velocity, x0)
    noisy, velocity = demo.train.noised(x0, x0, torch.tensor([0.01, 0.2, 0.4]))  # no swap so near the picture
    torch.testing.assert_close(noisy - torch.tensor([0.01, 0.2, 0.4])[:, None, None] * velocity, x0)


def test_a_widened_transformer_draws_as_before_until_it_is_trained(demo, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = demo.model.SHAPES["tiny"]
    transformer = demo.model.build_transformer(shape)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.1)
    ids = demo.model.image_ids(16, 1, torch.device("cpu"))
    given = {
        "timestep": torch.full((2,), 0.6),
        "guidance": torch.ones(2),
        "pooled_projections": torch.randn(2, shape.clip_width),
        "encoder_hidden_states": torch.randn(2, 3, shape.t5_width),
        "txt_ids": torch.zeros(3, 3),
        "img_ids": ids,
        "return_dict": False,
    }
    noisy, seen = torch.randn(2, len(ids), 16), torch.randn(2, len(ids), 64)
    with torch.no_grad():
        stock = transformer(hidden_states=noisy, **given)[0]
        demo.restyle.widen(transformer)
        both = torch.cat([noisy, seen], -1)
        torch.testing.assert_close(transformer(hidden_states=both, **given)[0], stock)
        transformer.x_embedder.weight[:, 16:] = 0.1
        trained = transformer(hidden_states=both, **given)[0]
    assert not torch.allclose(trained, stock)
    save_file(transformer.state_dict(), tmp_path / "restyle.safetensors")
    other = demo.model.build_transformer(shape)
    demo.restyle.load_restyling(other, tmp_path / "restyle.safetensors")
    with torch.no_grad():
        assert other(hidden_states=both, **given)[0].equal(trained)


def test_restyling_sees_every_style_but_its_own_and_none_that_is_held_out(demo) -> None:
    pairs = [pair(demo, c, label, s, held_out=s == c) for c, label in enumerate(("taco", "owl")) for s in range(4)]
    further = [pair(demo, 1, "tent", s, extra=True) for s in range(4)]  # its number is the owl's
    trained = [p for p in pairs if not p.held_out] + further
    places = demo.restyle.places_by_style(trained + [pairs[0], pairs[5]], len(trained))
    assert places[0].tolist() == [-1, -1, 1, 2]  # the taco's second style; its first is held out
    assert places[3].tolist() == [-1, -1, 4, 5]
    assert places[7].tolist() == [6, -1, 8, 9]
    assert places[-2:].tolist() == [[-1, 0, 1, 2], [3, -1, 4, 5]]
    latents = torch.arange(10.0)[:, None, None].expand(10, 3, 2) + 1
    seen = demo.restyle.side_by_side(latents.__getitem__, places[[0, -1]])
    assert seen.shape == (2, 3, 8)
    assert seen[:, 0].tolist() == [[0, 0, 0, 0, 2, 2, 3, 3], [4, 4, 0, 0, 5, 5, 6, 6]]


class Seeing(nn.Module):
    """In a transformer's place: keeps what it was given, predicts nothing."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.given: list[torch.Tensor] = []

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        self.given.append(hidden_states)
        return (torch.zeros_like(hidden_states[..., :16]),)


def test_dreams_see_their_own_things_pictures(demo) -> None:
    transformer = Seeing()
    transformer.x_embedder = nn.Linear(80, 1)
    pipe = SimpleNamespace(
        transformer=transformer,
        encode_prompt=lambda clip, texts, **_: (torch.zeros(len(texts), 2, 4), torch.zeros(len(texts), 4), None),
    )
    missing = [pair(demo, 0, "taco", 1), pair(demo, 1, "owl", 3)]
    dreams = demo.dream.dreams_of(torch.tensor([[1], [2]]), ["unnamed below 1.1"], [0.5], each=1, seed=0)
    real = torch.randn(3, 1024, 16)
    beside = torch.tensor([[0, -1, 1, -1], [-1, 2, -1, -1]])
    drawn, worth = demo.dream.dream(pipe, missing, dreams, real, beside, [], 128)
    assert not worth.any()
    noisy, seen = transformer.given[0].split([16, 64], -1)
    torch.testing.assert_close(drawn.float(), noisy, atol=2e-3, rtol=2e-3)  # kept as halves
    assert seen[0].equal(torch.cat([real[0], torch.zeros(1024, 16), real[1], torch.zeros(1024, 16)], -1))
    assert seen[1].equal(torch.cat([torch.zeros(1024, 16), real[2], torch.zeros(1024, 32)], -1))
    noise = torch.stack([torch.randn(1024, 16, generator=torch.Generator().manual_seed(d.seed)) for d in dreams])
    torch.testing.assert_close(noisy, torch.lerp(real[[1, 2]], noise, 0.5))


def test_views_of_further_pictures_follow_all_pictures(demo) -> None:
    torch.manual_seed(0)
    pictures = torch.randint(256, (KNOWN + FURTHER, 3, 16, 16), dtype=torch.uint8)
    both = demo.train.with_views(pictures, FURTHER)
    assert both.shape == (KNOWN + demo.train.VIEWS * FURTHER, 3, 16, 16)
    assert both[: KNOWN + FURTHER].equal(pictures)
    views = both[KNOWN:].unflatten(0, (demo.train.VIEWS, FURTHER))
    assert len({view.numpy().tobytes() for view in views}) == demo.train.VIEWS


def test_restyling_learns_from_other_styles_in_the_same_view(demo) -> None:
    data, _ = data_of(demo)
    trained = [pair(demo, c, "", s) for c in range(2) for s in range(4) if s != c]
    trained += [pair(demo, c, "", s, extra=True) for c in range(2) for s in range(4)]
    styles = torch.tensor([p.style for p in trained])
    beside = demo.restyle.places_by_style(trained, len(trained))
    given = {}

    def transformer(**kwargs: torch.Tensor) -> tuple[torch.Tensor]:
        given.update(kwargs)
        return (torch.zeros(512, TOKENS, CHANNELS),)

    texts = torch.arange(5.0)[:, None, None].expand(5, 2, 4), torch.arange(5.0)[:, None].expand(5, 4)
    kind = demo.train.Kind(128, 1, 512, (32,))
    torch.manual_seed(0)
    loss = demo.restyle.loss_of(transformer, data, styles, beside, kind, texts, torch.zeros(TOKENS, 3))
    assert float(loss) > 0
    assert given["guidance"].eq(demo.guide.GIVEN).all()  # what draw gives too: weights in training read it
    noisy, seen = given["hidden_states"].split([CHANNELS, 4 * CHANNELS], -1)
    assert noisy.shape == (512, TOKENS, CHANNELS)
    slots = seen[:, 0, ::CHANNELS].long()  # latents hold their places; 0 is none, or the very first picture
    style = given["pooled_projections"][:, 0].long()
    assert given["encoder_hidden_states"][:, 0, 0].long().equal(style)
    assert {0, 1, 2, 3, 4} == set(style.tolist())
    assert 0.05 < float((style == 4).float().mean()) < 0.2  # no style read
    read = style < 4
    assert not slots[read].gather(1, style[read, None]).any()  # its own style's slot is empty
    further = slots[(slots >= KNOWN).any(1)]
    views, places = (further - KNOWN) // FURTHER, (further - KNOWN) % FURTHER
    for row, view, place in zip(further.tolist(), views.tolist(), places.tolist(), strict=True):
        there = [i for i in range(4) if row[i]]
        assert len({view[i] for i in there}) == 1  # one view of one thing
        assert len({place[i] // 4 for i in there}) == 1
        assert all(place[i] % 4 == i for i in there)
    assert len(set(views[further > 0].tolist())) == VIEWS
    assert (further == 0).sum(1).float().mean() > 1.3  # and some are hidden
