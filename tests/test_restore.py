"""Undo is exact, in any order, after anything the user did meanwhile; other pipelines never notice."""

from __future__ import annotations

import copy
import enum
import gc
import io
import itertools
import pickle
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend

import dit_accel
from dit_accel import attend
from dit_accel.attachment import Attachment
from dit_accel.call import AttentionCall
from dit_accel.errors import AlreadyAcceleratedError, ConfigError, NonFiniteError, UnsupportedError

OPTIONS = {
    "density": 0.5,
    "dense_steps": 0,
    "picture": (1, 4, 4),
    "video": (1, 4, 4),
    "block_q": 16,
    "block_k": 16,
}


PLAIN = (type(None), bool, int, float, str, bytes, type, enum.Enum, torch.dtype, torch.device)


class Same:
    """An object that equals itself alone."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.it is other.it

    def __repr__(self) -> str:
        return f"<{type(self.it).__name__} at {id(self.it):#x}>"


def leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what containers hold, with the way there; hooks by their place, because their keys count all hooks made."""
    if isinstance(value, Mapping):
        named = enumerate(value.values()) if "hooks" in path else value.items()
    elif isinstance(value, list | tuple):
        named = enumerate(value)
    else:
        yield path, value
        return
    yield f"{path}: {type(value).__name__}", len(value)
    for name, inner in named:
        yield from leaves(f"{path}.{name}", inner)


def attributes(pipe: Any) -> Iterator[tuple[str, Any]]:
    """Yield all attributes of a pipeline, of its transformers' modules and of their processors."""
    yield from leaves("pipe", vars(pipe))
    for number in ("transformer", "transformer_2"):
        if (model := getattr(pipe, number, None)) is None:
            continue
        for name, module in model.named_modules(prefix=number):
            yield f"{name} in order", " ".join(vars(module))
            yield from leaves(name, vars(module))
            if (processor := getattr(module, "processor", None)) is not None:
                yield f"{name}.processor", processor
                yield from leaves(f"{name}.processor", vars(processor))


def snapshot(pipe: Any) -> dict[str, Any]:
    """Describe everything that an accelerator could leave behind, so that it equals an untouched twin's."""
    return {path: described(value) for path, value in attributes(pipe)}


def described(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        return type(value), value.shape, value.dtype, value.requires_grad
    return type(value), getattr(value, "__qualname__", "")


def objects(pipe: Any) -> dict[str, Same]:
    """Name every object that a pipeline, its modules, processors and hooks consist of, to be compared by identity."""
    return {path: Same(value) for path, value in attributes(pipe) if not isinstance(value, PLAIN)}


def run_once(pipe: Any, call: dict[str, Any]) -> Any:
    """Return the pipeline after a run: stock makes a registry of hooks at its first."""
    tiny.generate(pipe, call, steps=1)
    return pipe


def accelerated(pipe: Any, **changes: Any) -> dit_accel.Acceleration:
    return dit_accel.accelerate(pipe, "draft", **{**OPTIONS, **changes})


def leave_hook(pipe: Any) -> None:
    pipe.transformer.register_forward_pre_hook(lambda *_: None)


def replace_hook(pipe: Any) -> None:
    hooks = pipe.transformer._forward_hooks
    hooks[next(iter(hooks))] = lambda *_: None


def wrap_method(pipe: Any) -> None:
    pipe.transformer.cache_context = pipe.transformer.cache_context


def leave_attribute(pipe: Any) -> None:
    pipe._dit_accel = None


def change_value(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0].attn.heads += 1


def change_processor(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0].attn.processor._attention_backend = "flash"


def swap_processor(pipe: Any) -> None:
    attn = pipe.transformer.transformer_blocks[0].attn
    attn.processor = type(attn.processor)()


def swap_weight(pipe: Any) -> None:
    attn = pipe.transformer.transformer_blocks[0].attn
    attn.to_q.weight = torch.nn.Parameter(attn.to_q.weight.detach().clone())


BY_VALUE = [leave_hook, wrap_method, leave_attribute, change_value, change_processor]
BY_IDENTITY = [leave_hook, replace_hook, wrap_method, swap_processor, swap_weight]


@pytest.mark.parametrize(("fault", "look"), [(f, snapshot) for f in BY_VALUE] + [(f, objects) for f in BY_IDENTITY])
def test_what_is_left_behind_is_seen(fault: Any, look: Any) -> None:
    pipe, _ = tiny.flux()
    pipe.transformer.register_forward_hook(lambda *_: None)  # one of the user's own
    before = look(pipe)
    assert look(pipe) == before
    fault(pipe)
    assert look(pipe) != before


def three() -> list[tuple[Any, dict[str, Any]]]:
    return [tiny.flux(0), tiny.flux(1), tiny.wan()]


def three_of_video() -> list[tuple[Any, dict[str, Any]]]:
    return [tiny.wan_two_experts(), tiny.hunyuan_video(), tiny.cogvideox_rotary()]


@pytest.mark.parametrize("make", [three, three_of_video])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_three_pipelines_restored_in_every_order(order: tuple[int, ...], make: Any) -> None:
    pipes, twins = make(), make()
    for pipe, call in twins:
        tiny.generate(pipe, call)
    stock = [tiny.generate(pipe, call) for pipe, call in twins]
    before = [objects(run_once(pipe, call)) for pipe, call in pipes]
    handles = [accelerated(pipe) for pipe, _ in pipes]
    for (pipe, call), expected, handle in zip(pipes, stock, handles, strict=True):
        assert not torch.equal(tiny.generate(pipe, call), expected)
        assert handle.report().sparse_calls > 0
    fresh, call = make()[0]
    assert torch.equal(tiny.generate(fresh, call), stock[0])
    for i in order:
        handles[i].restore()
        assert not handles[i].live
        pipe, call = pipes[i]
        assert torch.equal(tiny.generate(pipe, call), stock[i])
        assert snapshot(pipe) == snapshot(twins[i][0])
        assert objects(pipe) == before[i]


def test_nested_contexts() -> None:
    (a, call_a), (b, call_b) = tiny.flux(0), tiny.wan()
    twin_a, twin_b = tiny.flux(0)[0], tiny.wan()[0]
    stock_a, stock_b = tiny.generate(twin_a, call_a), tiny.generate(twin_b, call_b)
    before_a, before_b = objects(run_once(a, call_a)), objects(run_once(b, call_b))
    with accelerated(a):
        with accelerated(b):
            assert not torch.equal(tiny.generate(a, call_a), stock_a)
            assert not torch.equal(tiny.generate(b, call_b), stock_b)
        assert torch.equal(tiny.generate(b, call_b), stock_b)
        assert not torch.equal(tiny.generate(a, call_a), stock_a)
    assert torch.equal(tiny.generate(a, call_a), stock_a)
    assert snapshot(a) == snapshot(twin_a)
    assert snapshot(b) == snapshot(twin_b)
    assert (objects(a), objects(b)) == (before_a, before_b)


def test_restore_twice_is_harmless() -> None:
    pipe, _ = tiny.flux()
    twin, _ = tiny.flux()
    handle = accelerated(pipe)
    handle.restore()
    handle.restore()
    assert snapshot(pipe) == snapshot(twin)


def test_a_restored_handle_is_not_used_again() -> None:
    pipe, _ = tiny.flux()
    with accelerated(pipe) as handle:
        handle.step(0, 2)
    with pytest.raises(ConfigError, match="with: this acceleration was restored"), handle:
        pass
    with pytest.raises(ConfigError, match="step: this acceleration was restored"):
        handle.step(0, 2)
    assert not handle.live


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ((0.5, 3), "step: index: expected a whole number, got 0.5"),
        ((0, 3.0), "step: total: expected a whole number, got 3.0"),
        ((3, 3), r"index must lie in 0\.\.2, got 3"),
        ((0, 3, 5), "step: branch is a name, such as 'cond', got 5"),
    ],
)
def test_a_step_that_cannot_be_is_refused(said: Any, message: str) -> None:
    with accelerated(tiny.flux()[0]) as handle, pytest.raises(ConfigError, match=message):
        handle.step(*said)


def test_second_acceleration_raises_and_names_the_first() -> None:
    pipe, call = tiny.flux()
    with accelerated(pipe) as handle:
        with pytest.raises(AlreadyAcceleratedError, match=r"'draft'.*restore\(\).*replace=True"):
            dit_accel.accelerate(pipe, "grat")
        with pytest.raises(AlreadyAcceleratedError):
            dit_accel.accelerate(pipe.transformer, "grat")
        second = dit_accel.accelerate(pipe, "grat-b", replace=True, dense_steps=0)
        assert not handle.live
        tiny.generate(pipe, call)
        assert second.report().recipe == "grat-b"
    second.restore()
    twin, _ = tiny.flux()
    tiny.generate(twin, call)
    assert snapshot(pipe) == snapshot(twin)


def test_a_replacement_that_is_refused_leaves_the_first_as_it_was() -> None:
    from diffusers import FirstBlockCacheConfig
    from test_profile import profile_of  # which imports this file

    pipe, call = tiny.flux()
    with accelerated(pipe) as handle:
        expected, before = tiny.generate(pipe, call), objects(pipe)
        for wrong in ({"profile": profile_of("duo", (0, 1))}, {"densty": 0.5}):
            with pytest.raises(ConfigError):
                dit_accel.accelerate(pipe, "grat-b", replace=True, **wrong)
        assert handle.live
        assert objects(pipe) == before
        assert torch.equal(tiny.generate(pipe, call), expected)
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(UnsupportedError, match="disable_cache"):
            dit_accel.accelerate(pipe, "grat-b", replace=True)
        assert handle.live
        pipe.transformer.disable_cache()
        assert torch.equal(tiny.generate(pipe, call), expected)


@pytest.mark.parametrize("make", [tiny.flux, tiny.VIDEO[0]])
def test_a_replacement_that_fails_half_way_leaves_the_first_at_work(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (pipe, call), (twin, _) = make(), make()
    tiny.generate(twin, call)
    handle = accelerated(pipe, every=2)
    expected, sites = tiny.generate(pipe, call), len(handle.sites)
    first = Attachment.attach

    def fails(self: Attachment, taker: Any) -> None:
        first(self, taker)  # what it put in place must go again
        if taker is not handle:
            raise CancelledError

    with monkeypatch.context() as patched:
        patched.setattr(Attachment, "attach", fails)
        with pytest.raises(CancelledError):
            dit_accel.accelerate(pipe, "grat-b", replace=True)
    assert handle.live
    assert len(handle.sites) == sites
    assert torch.equal(tiny.generate(pipe, call), expected)
    assert handle.report().recipe == handle.recipe.name
    with pytest.raises(AlreadyAcceleratedError):
        dit_accel.accelerate(pipe, "grat-b")
    handle.restore()
    assert snapshot(pipe) == snapshot(twin)
    assert torch.equal(tiny.generate(pipe, call), tiny.generate(twin, call))


class CancelledError(Exception):
    pass


def cancel_in_step_two(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    if step == 1:
        raise CancelledError
    return _[-1]


@pytest.mark.parametrize("make", [tiny.flux, *tiny.VIDEO])
def test_after_an_exception_inside_step_two(make: Any) -> None:
    (pipe, call), (twin, _) = make(), make()
    fresh, _ = make()
    with accelerated(fresh, every=2):
        expected = tiny.generate(fresh, call, steps=4)
    stock = tiny.generate(twin, call, steps=4)
    handle = accelerated(pipe, every=2)
    with pytest.raises(CancelledError):
        tiny.generate(pipe, call, steps=4, seed=9, callback_on_step_end=cancel_in_step_two)
    assert torch.equal(tiny.generate(pipe, call, steps=4), expected), "state of the cancelled run leaked"
    with pytest.raises(CancelledError):
        tiny.generate(pipe, call, steps=4, callback_on_step_end=cancel_in_step_two)
    handle.restore()
    assert torch.equal(tiny.generate(pipe, call, steps=4), stock)
    assert snapshot(pipe) == snapshot(twin)


def stage_that_raises(handle: dit_accel.Acceleration, index: int, _: pytest.MonkeyPatch) -> None:
    def explode(call: AttentionCall) -> AttentionCall:
        if call.step.index == index and call.site.index == 1:
            raise CancelledError
        return call

    handle.stages = (explode,)


def kernel_that_raises(handle: dit_accel.Acceleration, index: int, patch: pytest.MonkeyPatch) -> None:
    now: list[AttentionCall] = []

    def see(call: AttentionCall) -> AttentionCall:
        now[:] = [call]
        return call

    def explode(*given: Any) -> torch.Tensor:
        if now[0].step.index == index and now[0].site.index == 1:
            raise CancelledError
        return run(*given)

    run = attend.run
    handle.stages = (see,)
    patch.setattr(attend, "run", explode)


@pytest.mark.parametrize("make", [tiny.flux, tiny.wan])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("place", [stage_that_raises, kernel_that_raises])
def test_after_an_exception_inside_an_attention_call(
    place: Any, index: int, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second site raises at the first or the second step, when there is a plan of the step before to go on from."""
    (pipe, call), (twin, _), (fresh, _) = make(), make(), make()
    stock = tiny.generate(twin, call)
    with accelerated(fresh, every=2):
        expected = tiny.generate(fresh, call)
    before = objects(run_once(pipe, call))
    handle = accelerated(pipe, every=2)
    with monkeypatch.context() as patch:
        place(handle, index, patch)
        with pytest.raises(CancelledError):
            tiny.generate(pipe, call, seed=9)
    handle.stages = ()
    assert torch.equal(tiny.generate(pipe, call), expected), "state of the failed run leaked"
    with monkeypatch.context() as patch:
        place(handle, index, patch)
        with pytest.raises(CancelledError):
            tiny.generate(pipe, call)
    handle.restore()
    assert torch.equal(tiny.generate(pipe, call), stock)
    assert snapshot(pipe) == snapshot(twin)
    assert objects(pipe) == before


@pytest.mark.parametrize("make", [tiny.flux, tiny.wan])
def test_after_pipe_to(make: Any) -> None:
    (pipe, call), (twin, _) = make(), make()
    with accelerated(pipe):
        tiny.generate(pipe, call)
        pipe.to(torch.float64)
        twin.to(torch.float64)
    assert torch.equal(tiny.generate(pipe, call), tiny.generate(twin, call))
    assert snapshot(pipe) == snapshot(twin)


@pytest.mark.parametrize("make", [tiny.flux, tiny.wan])
def test_scheduler_swapped_meanwhile_is_followed_and_kept(make: Any) -> None:
    (pipe, call), (twin, _) = make(), make()
    config = dict(pipe.scheduler.config)
    before = objects(run_once(pipe, call))
    with accelerated(pipe, dense_steps=0.5) as handle:
        tiny.generate(pipe, call, steps=4)
        for target in (pipe, twin):
            target.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, shift=4.0)
        mine = pipe.scheduler
        assert mine is not before["pipe.scheduler"].it
        tiny.generate(pipe, call, steps=6)
        report = handle.report()
        assert report.steps == 6
        assert {row.steps for row in report.rows} == {"0-2", "3-5"}
    assert torch.equal(tiny.generate(pipe, call), tiny.generate(twin, call))
    assert snapshot(pipe) == snapshot(twin)
    assert objects(pipe) == {**before, "pipe.scheduler": Same(mine)}


def test_scheduler_of_two_calls_a_step() -> None:
    pipe, call = tiny.sd3()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    stock = tiny.generate(pipe, call, steps=3)
    with accelerated(pipe, density=1.0) as handle:
        assert torch.equal(tiny.generate(pipe, call, steps=3), stock)
        assert handle.report().steps == 5


@pytest.fixture
def math_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """Count the calls of diffusers' math backend; the backend that a test sets for the process is taken back."""
    calls: list[None] = []
    backend = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(None)
        return backend(*args, **kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, counted)
    with attention_backend("native"):
        yield calls


@pytest.mark.parametrize("make", [tiny.flux, tiny.wan])
def test_attention_backend_swapped_meanwhile_is_used_and_kept(make: Any, math_calls: list[None]) -> None:
    (pipe, call), (twin, _) = make(), make()
    before = objects(run_once(pipe, call))
    with accelerated(pipe, dense_steps=0.5) as handle:
        tiny.generate(pipe, call)
        assert not math_calls
        for target in (pipe, twin):
            target.transformer.set_attention_backend("_native_math")
        tiny.generate(pipe, call)
        dense = sum(row.calls for row in handle.report().rows if row.kind == "dense")
        assert handle.report().sparse_calls > 0
        assert len(math_calls) >= dense > 0  # Wan's cross-attentions are no sites
    backends = {path: leaf for path, leaf in snapshot(pipe).items() if path.endswith("._attention_backend")}
    assert set(backends.values()) == {AttentionBackendName._NATIVE_MATH}
    assert torch.equal(tiny.generate(pipe, call), tiny.generate(twin, call))
    assert snapshot(pipe) == snapshot(twin)
    assert objects(pipe) == before


def test_processor_replaced_meanwhile_stays_the_users() -> None:
    pipe, _ = tiny.flux()
    attn = pipe.transformer.transformer_blocks[0].attn
    mine = type(attn.processor)()
    with accelerated(pipe):
        attn.processor = mine
    assert attn.processor is mine


@pytest.mark.parametrize("make", [tiny.flux, tiny.wan_image])
def test_deep_copy_of_an_accelerated_model_is_stock(make: Any) -> None:
    (pipe, call), (twin, _) = make(), make()
    stock = tiny.generate(twin, call)
    with accelerated(pipe) as handle:
        pipe2, _ = make()
        pipe2.transformer = copy.deepcopy(pipe.transformer)
        assert torch.equal(tiny.generate(pipe2, call), stock)
        seen_by_the_handle = handle.report().calls
        processors = {type(m.processor) for m in pipe2.transformer.modules() if hasattr(m, "processor")}
    assert seen_by_the_handle == 0
    assert processors == {type(m.processor) for m in twin.transformer.modules() if hasattr(m, "processor")}


def pickled(model: torch.nn.Module) -> torch.nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [pickled, saved])
@pytest.mark.parametrize("make", [tiny.flux, tiny.wan])
def test_pickle_of_an_accelerated_model_is_stock(make: Any, way: Any) -> None:
    (pipe, call), (twin, _) = make(), make()
    stock = tiny.generate(twin, call)
    with accelerated(pipe) as handle:
        pipe2, _ = make()
        pipe2.transformer = way(pipe.transformer)
        with accelerated(pipe2) as other:
            assert not torch.equal(tiny.generate(pipe2, call), stock)
            assert other.report().calls
        assert torch.equal(tiny.generate(pipe2, call), stock)
        assert handle.report().calls == 0
        assert pipe2.transformer.cache_context.__self__ is pipe2.transformer
        assert way(pipe2.transformer).cache_context.__func__ is type(twin.transformer).cache_context


def test_save_pretrained_of_an_accelerated_pipeline_is_stock(tmp_path: Any) -> None:
    pipe, _ = tiny.flux()
    with accelerated(pipe):
        pipe.transformer.save_pretrained(tmp_path)
    loaded = type(pipe.transformer).from_pretrained(tmp_path)
    for a, b in zip(loaded.state_dict().values(), pipe.transformer.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_two_transformers_in_one_run() -> None:
    """Wan 2.2 hands over from one transformer to another within a run; both must know the step."""
    pipe, call = tiny.wan()
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    pipe.register_to_config(boundary_ratio=0.9)
    stock = tiny.generate(pipe, call, steps=4)
    with accelerated(pipe) as handle:
        sparse = tiny.generate(pipe, call, steps=4)
    report = handle.report()
    assert {row.group for row in report.rows} == {"transformer.blocks", "transformer_2.blocks"}
    assert report.steps == 4
    assert not torch.equal(stock, sparse)
    assert torch.equal(tiny.generate(pipe, call, steps=4), stock)


def test_failed_accelerate_changes_nothing() -> None:
    (pipe, _), (twin, _) = tiny.flux(), tiny.flux()
    before = objects(pipe)
    with pytest.raises(dit_accel.DitAccelError):
        dit_accel.accelerate(pipe, "draft", densty=0.5)
    assert snapshot(pipe) == snapshot(twin)
    dit_accel.accelerate(pipe, "draft", density=0.5).restore()
    assert snapshot(pipe) == snapshot(twin)
    assert objects(pipe) == before


def test_wrong_objects_are_refused_with_what_they_hold() -> None:
    with pytest.raises(UnsupportedError, match="int holds no diffusion transformer"):
        dit_accel.accelerate(3)
    with pytest.raises(UnsupportedError, match="Linear is no transformer whose token layout is known"):
        dit_accel.accelerate(torch.nn.Linear(2, 2))
    pipe, _ = tiny.flux()
    pipe.transformer = None
    with pytest.raises(UnsupportedError, match=r"its parts: .*vae"):
        dit_accel.accelerate(pipe)


def test_compiled_transformers_are_accelerated_within() -> None:
    pipe, _ = tiny.flux()
    original = pipe.transformer
    pipe.transformer = torch.compile(original)
    handle = dit_accel.accelerate(pipe)
    with pytest.raises(AlreadyAcceleratedError):
        dit_accel.accelerate(original)
    handle.restore()
    assert "_dit_accel_seat" not in dir(original.transformer_blocks[0].attn.processor)


def test_enabled_diffusers_cache_is_refused() -> None:
    from diffusers import FirstBlockCacheConfig

    pipe, _ = tiny.flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UnsupportedError, match="disable_cache"):
        dit_accel.accelerate(pipe)
    pipe.transformer.disable_cache()
    dit_accel.accelerate(pipe).restore()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_latents_raise_and_name_the_step(value: float) -> None:
    pipe, call = tiny.flux()
    bad = torch.full((1, 221, 4), value)
    with accelerated(pipe):
        with pytest.raises(NonFiniteError, match="the latents handed in hold NaN or Inf"):
            tiny.generate(pipe, call, latents=bad)

        def poison(_: Any, step: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            return {"latents": kwargs["latents"] * value} if step == 1 else kwargs

        with pytest.raises(NonFiniteError, match="the latents after step 1"):
            tiny.generate(pipe, call, steps=4, callback_on_step_end=poison)
        assert torch.isfinite(tiny.generate(pipe, call)).all()


def test_processor_with_weights_is_left_alone_and_named() -> None:
    pipe, call = tiny.flux()

    class Weighted(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None,
                    attention_mask: Any = None, image_rotary_emb: Any = None) -> Any:  # fmt: skip
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    attn = pipe.transformer.transformer_blocks[0].attn
    inner = attn.processor
    del attn.processor
    attn.processor = Weighted(inner)
    with accelerated(pipe) as handle:
        tiny.generate(pipe, call)
    assert handle.report().untouched == {"transformer_blocks.0.attn": "its processor Weighted has weights of its own"}
    assert isinstance(attn.processor, Weighted)


@pytest.mark.parametrize("kept", [False, True], ids=["handle dropped", "handle kept to the end"])
@pytest.mark.parametrize("family", [tiny.flux, tiny.wan], ids=lambda f: f.__name__)
def test_a_pipeline_that_is_let_go_is_freed_though_never_restored(family: Any, kept: bool) -> None:
    pipe, call = family()
    handle = dit_accel.accelerate(pipe, "hilbert-ear", density=0.5)
    tiny.generate(pipe, call)
    gone = weakref.ref(pipe.transformer)
    if not kept:
        del handle
        gc.collect()
        with pytest.raises(AlreadyAcceleratedError):  # the pipeline keeps it
            dit_accel.accelerate(pipe, "draft")
    pipe = call = handle = None
    gc.collect()
    assert gone() is None
