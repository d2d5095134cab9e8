"""Which back end a door takes, and what it says when the one named cannot run."""

from __future__ import annotations

import pytest
import torch

from dit_accel.kernels.choice import prefer, takes_triton

X = torch.zeros(2, 3)


def fine(x):
    return []


def cannot(x):
    return ["it is Tuesday", "and raining"]


def missing(x):
    raise ImportError("no module named triton")


def unasked(x):
    raise AssertionError("asked, though the reference is chosen")


def test_a_cpu_takes_the_reference_and_asks_nobody():
    assert not takes_triton(None, "run", unasked, X)
    assert not takes_triton("reference", "run", unasked, X)


def test_a_name_is_obeyed_and_a_preference_followed():
    assert takes_triton("triton", "run", fine, X)
    with prefer("triton"):
        assert takes_triton(None, "run", fine, X)
        assert not takes_triton("reference", "run", unasked, X)


@pytest.mark.parametrize("against", [cannot, missing])
def test_what_is_only_preferred_gives_way(against):
    with prefer("triton"):
        assert not takes_triton(None, "run", against, X)


def test_a_named_back_end_that_cannot_says_why():
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot merge \[2, 3\]: it is Tuesday; and raining"):
        takes_triton("triton", "merge {}", cannot, X)
    with pytest.raises(RuntimeError, match=r"cannot merge: triton cannot be imported \(no module named triton\)"):
        takes_triton("triton", "merge", missing, X)


def test_an_unknown_back_end_is_refused():
    with pytest.raises(ValueError, match="backend is 'trition'; known are 'triton', 'reference' and None"):
        takes_triton("trition", "run", unasked, X)
