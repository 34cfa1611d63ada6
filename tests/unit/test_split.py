"""Which part of a packed matrix a tensor-parallel rank holds."""

from __future__ import annotations

import pytest

from gemq import UserError
from gemq.checkpoint.format import PackedFormat
from gemq.integrations.vllm.split import divided_groups, groups_of_rank
from gemq.quant.widths import Width


def test_ranks_share_all_groups():
    ranges = [groups_of_rank("down_proj", 768, 64, rank, 4, ()) for rank in range(4)]
    assert [i for groups in ranges for i in range(groups.start, groups.stop)] == list(range(12))


def test_a_cut_group_is_refused_with_the_sizes_that_work():
    """12 groups here, 8 elsewhere: 1, 2 and 4 ranks cut neither."""
    with pytest.raises(UserError, match=r"size 8 would cut .* down_proj \(768 columns\): use .* 1, 2 or 4$"):
        groups_of_rank("down_proj", 768, 64, 0, 8, {8})


def test_groups_of_what_is_divided():
    packed = PackedFormat(
        experts={"layers.0.mlp.experts": {"gate_up_proj": (Width.TWO_BIT,), "down_proj": (Width.TWO_BIT,)}},
        linears={"layers.0.self_attn.o_proj": Width.FOUR_BIT, "layers.0.self_attn.q_proj": Width.FOUR_BIT},
        group_size=128,
    )
    shapes = {
        "layers.0.mlp.experts.gate_up_proj": (192, 512),
        "layers.0.mlp.experts.down_proj": (512, 96),
        "layers.0.self_attn.o_proj": (512, 256),
        "layers.0.self_attn.q_proj": (256, 512),
    }
    assert divided_groups(packed, shapes) == {3, 2}  # 96 columns have groups of 32
