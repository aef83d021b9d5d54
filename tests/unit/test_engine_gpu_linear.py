"""Stored weights on a GPU: a product with them is one with their floats, by Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear

from flowkv_engine.engine.attention import TorchAttention
from flowkv_engine.engine.batch import WorkItem, pack
from flowkv_engine.engine.flat import Projection
from flowkv_engine.engine.forward import ModulesForward, make_forward
from flowkv_engine.engine.gpu.attention import TritonAttention
from flowkv_engine.engine.gpu.forward import TritonFlatForward
from flowkv_engine.engine.gpu.linear import FusedLinear, grouped
from flowkv_engine.engine.stored import FORMS, GROUPED_FORMS, Q4_1, Q6_K, Form, Stored, widened
from flowkv_engine.engine.stored_modules import StoredLinear, widen_embedding
from tests.drive import BLOCK_SIZE, load_tiny, make_pool, make_sequence
from tests.stored_models import make_stored_model, random_weight

CPU = torch.device("cpu")
FORMS_OF_CODES = [form for form in (*FORMS, *GROUPED_FORMS) if form.bits < 16]


def check(weight: Stored, num_rows: int) -> None:
    states = torch.randn(num_rows, weight.shape[1], generator=torch.manual_seed(1))
    got = grouped(weight, CPU).multiply(states, None)
    expected = linear(states.double(), torch.from_numpy(widened(weight)).double())
    torch.testing.assert_close(got.double(), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("form", FORMS_OF_CODES, ids=[form.name for form in FORMS_OF_CODES])
def test_a_product_is_that_of_the_floats(form: Form) -> None:
    """Tiles are not full on any side."""
    check(random_weight(form, 37, 1 if form.has_supers else 3), 3)


@pytest.mark.full
@settings(max_examples=60)
@given(
    form=st.sampled_from(FORMS_OF_CODES),
    num_rows=st.integers(1, 70),
    num_cols=st.integers(1, 140),
    num_blocks=st.integers(1, 9),
)
def test_products_of_any_sizes(form: Form, num_rows: int, num_cols: int, num_blocks: int) -> None:
    check(random_weight(form, num_cols, num_blocks), num_rows)


def test_projections_of_one_input_become_one_or_stand_side_by_side() -> None:
    """Of three kinds: two of one form with biases, one in another order of inputs, and floats."""
    form = next(form for form in GROUPED_FORMS if form.name == "INT4_32")
    order = np.random.default_rng(0).permutation(64)
    first = StoredLinear(random_weight(form, 5, 2), torch.randn(5))
    projections: list[Projection] = [
        first,
        StoredLinear(random_weight(form, 7, 2, seed=1), torch.randn(7)),
        StoredLinear(random_weight(form, 3, 2, seed=2), None, order),
        nn.Linear(64, 2, bias=False),
    ]
    states = torch.randn(4, 64, generator=torch.manual_seed(0))
    with torch.no_grad():
        expected = torch.cat([each(states) for each in projections], dim=1)
        fused = FusedLinear(projections, CPU)
        torch.testing.assert_close(fused(states), expected, atol=1e-5, rtol=1e-5)
    assert len(first.stored.blocks) == 0  # kept once


@pytest.mark.full
@pytest.mark.parametrize("form", [Q4_1, Q6_K], ids=["Q4_1", "Q6_K"])
@torch.inference_mode()
def test_the_forward_over_stored_weights_equals_the_modules(tmp_path: Path, form: Form) -> None:
    model = load_tiny(make_stored_model(tmp_path / "m", [form]))
    widen_embedding(model.module, torch.float32)
    pools = make_pool(model, 2), make_pool(model, 2)
    plain, attention = TorchAttention(pools[0]), TritonAttention(pools[1])
    modules = ModulesForward(model.module, plain, model.spans)
    sequence = make_sequence([token * 7 % 512 for token in range(9)], [1, 0])
    batch = pack([WorkItem(sequence, 9)], BLOCK_SIZE)
    inputs = torch.from_numpy(batch.token_ids), torch.from_numpy(batch.position_ids), torch.arange(9)
    plain.bind(batch)
    expected = modules(*inputs)
    forward = make_forward(model.module, attention, model.spans)
    assert isinstance(forward, TritonFlatForward)
    attention.bind(batch)
    off = (forward(*inputs) - expected).norm() / expected.norm()
    assert off < 1e-4
