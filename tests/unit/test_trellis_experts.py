"""Experts with trellis codes from candidates to the student of distillation, and costs of widths in between."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gemq.allocation.interpolation import interpolate
from gemq.allocation.problem import Budget, Problem, allocate
from gemq.calibration.activations import Activations, layer_hessians
from gemq.calibration.expert_hessians import InputHessians
from gemq.calibration.windows import Windows
from gemq.distillation.student_matrices import TrellisStudentMatrix
from gemq.errors import UserError
from gemq.layers.candidates import LayerCandidates, build_candidates
from gemq.layers.output_hessians import OutputHessians
from gemq.layers.quantizer import Quantizer
from gemq.layers.reconstruction import assemble_layer, layer_overrides, reconstruct_layer
from gemq.layers.scheme import QuantizationScheme
from gemq.layers.trellis_experts import TrainableRows, TrellisBatch
from gemq.models.equalization import Equalization, NormFold, RowFold
from gemq.models.experts import expert_weight, record_experts_calls
from gemq.models.replay import Replay
from gemq.models.structure import find_structure
from gemq.pipeline import codes_stage
from gemq.pipeline.codes_stage import CodesChoice
from gemq.quant import trellis
from gemq.quant.grid import decode_scales
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.widths import TrellisWidth, Width
from gemq.recipe import Recipe
from support.families import random_model, tiny_config, tokens

torch.set_num_threads(1)
CANDIDATES = tuple(map(TrellisWidth.read, (1, 2, 4)))
QUANTIZER = Quantizer("gptq", 128, 0.01, 0.1)


def windows() -> Windows:
    return Windows(tokens(6, 12), torch.zeros(6, dtype=torch.int64), ("text",), (72,))


@pytest.fixture(autouse=True)
def few_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU searches through 256 states in a sixteenth of the time."""
    monkeypatch.setattr(trellis, "STATE_BITS", 8)


@pytest.fixture
def replay() -> Replay:
    model = random_model(tiny_config("olmoe", hidden_size=32, intermediate_size=32, num_experts=2, num_hidden_layers=1))
    return Replay(model, find_structure(model))


def candidates_of(replay: Replay) -> LayerCandidates:
    activations = Activations.start(replay, windows(), 24, 0)
    return build_candidates(replay, 0, activations, QUANTIZER, CANDIDATES, None)[0]


def test_candidates_get_better_with_bits_and_return_from_a_file(replay):
    candidates = candidates_of(replay)
    layer = replay.structure.layers[0]
    module = replay.model.get_submodule(layer.experts.path)
    for matrix in layer.experts.matrices:
        weight = expert_weight(module, matrix.name)
        errors = []
        for width in CANDIDATES:
            errors.append((candidates.experts[matrix.name][width].dequantize() - weight).norm() / weight.norm())
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.15
    back = LayerCandidates.from_tensors(candidates.to_tensors(), layer, CANDIDATES, None)
    assert back.to_tensors().keys() == candidates.to_tensors().keys()


def test_reconstruction_at_widths_between_the_candidates(replay):
    layer = replay.structure.layers[0]
    widths = [tuple(map(TrellisWidth.read, pair)) for pair in ((1.625, 2), (3.125, 2))]
    activations = Activations.start(replay, windows(), 24, 0)
    exact_candidates = candidates_of(replay)
    quantizer = dataclasses.replace(QUANTIZER, compensates=False)
    quantized = reconstruct_layer(replay, 0, activations, quantizer, widths, None)
    path = layer.experts.path
    for expert, pair in enumerate(widths):
        for matrix, width in zip(layer.experts.matrices, pair, strict=True):
            name = f"{path}.{expert}.{matrix.name}"
            stored = TrellisMatrix.from_tensors(quantized.tensors, name, width)
            assert stored.nbytes == width.matrix_bytes(matrix.rows, matrix.columns)
            in_use = expert_weight(replay.model.get_submodule(path), matrix.name)[expert]
            torch.testing.assert_close(in_use, stored.dequantize())
    # nothing before the first layer differs, so the codes of a candidate width are the candidate's
    expected = assemble_layer(exact_candidates, layer, [(TrellisWidth(16), TrellisWidth(16))] * 2).tensors
    name = f"{path}.1.down_proj.codes"
    assert torch.equal(quantized.tensors[name], expected[name])


def test_training_changes_row_scales_alone(replay):
    candidates = candidates_of(replay)
    matrices = [candidates.experts["down_proj"][width].select(0) for width in CANDIDATES[:2]]
    batch = TrellisBatch.of(matrices, torch.float32)
    rows = TrainableRows(batch)
    target = batch.weight() * torch.tensor([1.3, 0.8]).view(2, 1, 1)
    optimizer = torch.optim.Adam(rows.leaves(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        (rows.weight() - target).square().sum().backward()
        optimizer.step()
    trained = rows.batch_result()
    ratio = trained.scales / batch.scales
    assert ((ratio[0] > 1.15) & (ratio[0] < 1.45)).all()
    assert ((ratio[1] > 0.7) & (ratio[1] < 0.9)).all()
    for index in range(2):
        stored = trained.matrix(index)
        assert torch.equal(stored.codes, matrices[index].codes)
        torch.testing.assert_close(stored.dequantize(), trained.weight()[index])
    # as ranks exchange them: padded to one length
    gathered = trained.gather(CANDIDATES[:2], lambda tensors: [torch.cat([tensor]) for tensor in tensors])
    assert torch.equal(gathered.matrix(1).codes, matrices[1].codes)


def test_a_student_has_the_weights_of_its_layer(replay):
    layer = replay.structure.layers[0]
    widths = [(TrellisWidth(8), TrellisWidth(16)), (TrellisWidth(32), TrellisWidth(8))]
    quantized = assemble_layer(candidates_of(replay), layer, widths)
    matrix = layer.experts.matrices[1]
    student = TrellisStudentMatrix(quantized, layer.experts, matrix, [TrellisWidth(16), TrellisWidth(8)])
    overrides = layer_overrides(replay.model, layer, quantized, QuantizationScheme(widths, None))
    torch.testing.assert_close(student.weight(), overrides[f"{layer.experts.path}.down_proj"])
    student.weight().sum().backward()
    assert student.grids.scale_change.grad.abs().min() > 0
    name = f"{layer.experts.path}.1.down_proj.scales"
    assert torch.equal(student.result()[name], quantized.tensors[name])
    assert decode_scales(student.result()[name]).min() > 0


def test_costs_between_candidates_follow_the_bits():
    widths = tuple(map(TrellisWidth.read, (1, 2, 3)))
    costs = np.array([[8.0, 2.0, 0.5], [1.0, 0.5, 0.0]])
    sizes = np.array([[width.matrix_bytes(64, 64) for width in widths]] * 2)
    zeros = np.zeros(2, np.int64)
    problem = Problem(widths, zeros, costs, zeros + 4096, sizes, zeros)
    fine = interpolate(problem, tuple(TrellisWidth(eighths) for eighths in range(8, 25)))
    assert fine.costs[0, 4] == pytest.approx(4.0)
    # a cost of zero would make the widths before it seem nearly free
    assert fine.costs[:, [0, 8, 16]] == pytest.approx(np.array([[8, 2, 0.5], [1, 0.5, 0.5 / 16]]))
    assert fine.bytes[0, 5] == TrellisWidth(13).matrix_bytes(64, 64)
    allocation = allocate(fine, Budget("bits", 2.3))
    assert 2.3 - 0.125 / 2 <= allocation.nominal_bits <= 2.3
    assert allocation.predicted_cost < allocate(problem, Budget("bits", 2.3)).predicted_cost


def test_recipes_with_trellis_codes():
    recipe = Recipe(codes="trellis", widths=(2, "1.5", 3.125))
    assert [width.value for width in recipe.candidate_widths] == [1.5, 2, 3.125]
    assert len(recipe.allocated_widths) == 14
    assert recipe.replace(bits=2.5).to_dict()["widths"] == [1.5, 2, 3.125]
    assert Recipe(codes="trellis", bits=3.5).candidate_widths[-1] == TrellisWidth(32)
    assert TrellisWidth(16) == 2 != TrellisWidth(17)
    assert TrellisWidth(16) != Width.TWO_BIT
    with pytest.raises(UserError, match=r"no trellis width 2\.1: choose a multiple of 0\.125"):
        Recipe(codes="trellis", widths=(2.1,))
    with pytest.raises(UserError, match=r"no width 1\.5"):
        Recipe(codes="affine", widths=(1.5,))
    with pytest.raises(UserError, match="trellis codes have no rtn"):
        Recipe(codes="trellis", quantizer="rtn")


def choice(replay: Replay, folds: list[object], device: str = "cuda", **keys: object) -> CodesChoice:
    """The codes that a job would get whose experts' inputs are scaled by ``folds``."""
    equalization = Equalization([f"{layer.path}." for layer in replay.structure.layers], {})
    equalization.set_folds(0, folds)
    cache = SimpleNamespace(equalization=equalization)
    job = SimpleNamespace(recipe=Recipe(**keys), device=torch.device(device))
    return codes_stage._choose(job, SimpleNamespace(structure=replay.structure, layer_cache=cache))


def test_a_job_gets_trellis_codes_where_it_can(replay):
    norm = NormFold("norm.weight", None, False, ("mlp.experts.gate_up_proj", "mlp.gate.weight"), (), ())
    down = RowFold("mlp.experts.gate_up_proj", "mlp.experts.down_proj", None, torch.arange(32))
    assert choice(replay, [norm, down]) == CodesChoice("trellis")
    assert choice(replay, [norm, down], device="cpu").reason == "trellis codes need a GPU"
    assert choice(replay, [norm, down], widths=(1.6, 2)).reason == "only affine codes have the widths 1.6 and 8"
    assert choice(replay, [norm]).reason == "the experts' inputs cannot be equalized in 1 layers"
    assert Recipe(widths=(1.5, 2)).codes == "trellis"
    replay.structure.layers[0].experts.matrices[1].__dict__["columns"] = 40
    assert choice(replay, [norm, down]).reason == "16 does not divide 32 x 40"


def test_output_hessians_against_jacobians(replay):
    """With gradients that do not depend on the token, they are what backpropagation gives."""
    experts = replay.structure.layers[0].experts
    module = replay.model.get_submodule(experts.path)
    first, down = experts.matrices
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(down.rows, down.rows, generator=generator)
    gradients = factor @ factor.T
    activations = Activations.start(replay, windows(), 72, 0)  # one micro-batch
    inputs = InputHessians(experts, slice(0, 2), replay.device, with_down=False, with_slopes=True)
    layer_hessians(replay, 0, activations, [], [inputs], with_outputs=False)
    hessians = OutputHessians(module, experts, slice(0, 2), gradients, inputs.slopes, 0.0)
    assert torch.equal(hessians.hessians(down.name, slice(1, 2)), gradients.unsqueeze(0))

    with record_experts_calls(module) as calls:
        replay.run(0, activations.hidden[0], activations.calls[0][0])
    token, slot = torch.where(calls[0].top_k_index == 1)
    weight_first, weight_down = (expert_weight(module, matrix.name)[1] for matrix in experts.matrices)

    def output(pre_activation: torch.Tensor) -> torch.Tensor:
        gate, up = pre_activation.chunk(2)
        return weight_down @ (torch.nn.functional.silu(gate) * up)

    expected = torch.zeros(first.rows, first.rows)
    for row, routing in zip(calls[0].hidden[token], calls[0].top_k_weights[token, slot], strict=True):
        jacobian = torch.autograd.functional.jacobian(output, weight_first @ row) * routing
        expected += jacobian.T @ gradients @ jacobian / len(token)
    torch.testing.assert_close(hessians.hessians(first.name, slice(1, 2))[0], expected, rtol=1e-3, atol=1e-6)
