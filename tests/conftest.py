"""What all tests share: no network, one seed, quiet libraries, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which diffusers does

import diffusers
import pytest
import transformers

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and on a busy machine it waits long
transformers.logging.set_verbosity_error()
diffusers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
