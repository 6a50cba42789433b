"""Every public function against its reference in float64, over random shapes, dtypes, layouts and options."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samples import NAMES, SAMPLES
from support import DTYPES, LAYOUTS, assert_parity, sample_inputs


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_keep_the_rule(name):
    sample = SAMPLES[name]

    # The seed decides tensors, options and grad_output; hypothesis only chooses and shrinks what a person can read.
    @given(
        leading=st.sampled_from(sample.leading),
        width=st.sampled_from(sample.widths),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(sorted(LAYOUTS)),
        seed=st.integers(0, 2**31 - 1),
    )
    def holds(leading, width, dtype, layout, seed):
        inputs, options = sample_inputs(name, seed, leading, width)
        assert_parity(name, inputs, options, dtype, layout=layout, seed=seed)

    holds()
