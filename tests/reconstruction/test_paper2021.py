# SPDX-License-Identifier: Apache-2.0
"""The paper's network, counted and checked against the paper's text."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from irem_bids.reconstruction import paper2021
from irem_bids.reconstruction.paper2021 import PaperNetwork, fit_paper, learning_rate
from irem_bids.settings import Irem2021

SMALL = Irem2021(
    fourier_features=32,
    width=24,
    epochs_2021=6,
    batch_size_2021=100,
    learning_rate_2021=1e-3,
    decay_every=2,
)


def samples(count: int = 530, seed: int = 0):
    """Random points in a box of 40 x 30 x 20 mm and a smooth function of them."""
    points = np.random.default_rng(seed).uniform([10, -20, 5], [50, 10, 25], (count, 3))
    values = 0.5 + 0.4 * np.sin(points[:, 0] / 6) * np.cos(points[:, 1] / 7) + points[:, 2] / 100
    return points, values


def linear_inputs(network: PaperNetwork) -> list[int]:
    return [m.in_features for m in network.modules() if isinstance(m, torch.nn.Linear)]


def test_eighteen_layers_with_the_papers_widths():
    network = PaperNetwork((0.0, 0.0, 0.0), 100.0)
    inputs = linear_inputs(network)
    assert len(inputs) == 18
    assert (inputs[0], inputs[6], inputs[12]) == (256, 512, 512)
    assert all(n == 256 for i, n in enumerate(inputs) if i not in (0, 6, 12))
    outputs = [m.out_features for m in network.modules() if isinstance(m, torch.nn.Linear)]
    assert outputs == [256] * 17 + [1]


@pytest.mark.parametrize(
    ("activation", "norms"), [("none", 17), ("relu", 17), ("batchnorm-relu", 18)]
)
def test_parameters_and_batch_norms_are_counted(activation, norms):
    network = PaperNetwork((0.0, 0.0, 0.0), 100.0, {"output_activation": activation})
    found = [m.num_features for m in network.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert len(found) == norms
    # 15 layers 256 -> 256, two 512 -> 256, one 256 -> 1; scale and shift of each norm
    linear = 15 * (256 * 256 + 256) + 2 * (512 * 256 + 256) + 256 + 1
    assert sum(p.numel() for p in network.parameters()) == linear + 2 * sum(found)


def test_every_layer_is_followed_by_batch_norm_and_relu():
    network = PaperNetwork((1.0, 2.0, 3.0), 20.0, SMALL, generator=torch.Generator().manual_seed(1))
    points = 20 * torch.randn(50, 3, generator=torch.Generator().manual_seed(2))
    network.train()
    features = network.features(points)
    x = features
    for i in range(17):
        if i in (6, 12):  # the 7th and 13th layers
            x = torch.cat([x, features], dim=1)
        x = x @ network.linears[i].weight.T + network.linears[i].bias
        x = (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + 1e-5)
        x = torch.clamp(x, min=0)
    expected = (x @ network.linears[17].weight.T + network.linears[17].bias)[:, 0]
    assert torch.allclose(network(points), expected, atol=1e-4)


def test_last_activations():
    points = 20 * torch.randn(200, 3, generator=torch.Generator().manual_seed(2))
    values = {}
    for name in ("none", "relu", "batchnorm-relu"):
        network = PaperNetwork((0.0, 0.0, 0.0), 20.0, replace(SMALL, output_activation=name))
        values[name] = network.train()(points)
    assert torch.allclose(values["relu"], torch.relu(values["none"]))
    expected = torch.relu(
        (values["none"] - values["none"].mean()) / values["none"].std(unbiased=False)
    )
    assert torch.allclose(values["batchnorm-relu"], expected, atol=1e-2)


def test_fourier_features_are_equation_two():
    generator = torch.Generator().manual_seed(7)
    network = PaperNetwork((10.0, 0.0, -5.0), 80.0, Irem2021(), generator=generator)
    b = network.frequencies
    assert b.shape == (128, 3)
    assert float(b.mean()) == pytest.approx(0, abs=0.15)
    assert float(b.std()) == pytest.approx(1, abs=0.1)
    point = torch.tensor([[90.0, 40.0, -5.0]])  # at (1, 0.5, 0) of the box
    phase = 2 * math.pi * (b[:, 0] + 0.5 * b[:, 1])
    expected = torch.cat([torch.cos(phase), torch.sin(phase)])
    assert torch.allclose(network.features(point)[0], expected, atol=1e-4)


def test_settings_of_the_gaps_are_respected():
    wide = PaperNetwork((0.0, 0.0, 0.0), 10.0, {"fourier_sigma": 3.0, "coordinate_range": 2.0})
    plain = PaperNetwork((0.0, 0.0, 0.0), 10.0)
    assert torch.allclose(wide.frequencies, 3 * plain.frequencies)
    point = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.allclose(wide.features(point), plain.features(6 * point), atol=1e-3)
    default = PaperNetwork((0.0, 0.0, 0.0), 10.0, {"initialisation": "torch"})
    assert float(default.linears[3].weight.detach().abs().max()) <= 1 / 16
    assert float(default.linears[3].bias.detach().abs().max()) > 0
    assert float(plain.linears[3].weight.detach().abs().max()) == pytest.approx(
        math.sqrt(6 / 256), rel=0.01
    )
    assert float(plain.linears[3].bias.detach().abs().max()) == 0
    with pytest.raises(ValueError, match="even number"):
        PaperNetwork((0.0, 0.0, 0.0), 10.0, {"fourier_features": 5})


def test_learning_rate_is_halved_every_500_epochs():
    rates = [learning_rate(Irem2021(), epoch) for epoch in (0, 499, 500, 999, 1000, 1499)]
    assert rates == [1e-4, 1e-4, 5e-5, 5e-5, 2.5e-5, 2.5e-5]


def test_optimiser_schedule_and_batch_are_the_papers(monkeypatch):
    seen: dict[str, list] = {"rate": [], "size": []}
    made = {}
    real = torch.optim.Adam

    class Watched(real):
        def __init__(self, *args, **kwargs):
            made.update(kwargs)
            super().__init__(*args, **kwargs)

        def step(self, *args, **kwargs):
            seen["rate"].append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    forward = PaperNetwork.forward

    def watched(self, points):
        seen["size"].append(len(points))
        return forward(self, points)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    monkeypatch.setattr(PaperNetwork, "forward", watched)
    points, values = samples(7600)
    settings = Irem2021(fourier_features=8, width=4, epochs_2021=3, decay_every=2)
    _network, history = fit_paper(points, values, settings, seed=0)
    assert made["betas"] == (0.9, 0.999)
    assert made["eps"] == 1e-8
    assert made["lr"] == 1e-4
    assert seen["size"] == [2500] * 9  # three whole batches an epoch, the last 100 voxels wait
    assert seen["rate"] == [1e-4] * 6 + [5e-5] * 3
    assert history["step"] == [3, 6, 9]


def test_training_fits_and_predicts_what_it_has_not_seen():
    points, values = samples(1500)
    unseen = samples(200, seed=5)
    told = []
    settings = replace(SMALL, epochs_2021=60, decay_every=30, fourier_sigma=0.3)
    network, history = fit_paper(
        points,
        values,
        settings,
        seed=3,
        held_out=unseen,
        progress=lambda fraction, text: told.append((fraction, text)),
    )
    assert history["loss"][-1] < 0.1 * history["loss"][0]
    assert history["held_out"][-1] < 0.2 * np.var(unseen[1])
    assert len(history["held_out"]) == len(history["held_out_step"]) == 60
    assert told[-1][0] == 1.0
    assert "epoch 60 of 60" in told[-1][1]
    assert not network.training
    box = network.config()
    assert box["half_extent"] == pytest.approx(20, abs=0.1)
    assert box["centre"] == pytest.approx([30, -5, 15], abs=0.2)


def test_folded_batch_norm_gives_the_same_image():
    points, values = samples()
    network, _ = fit_paper(points, values, SMALL, seed=1)
    with torch.inference_mode():
        single = network(torch.as_tensor(points, dtype=torch.float32))
    # a processor's way of summing moves float32 by 1e-5: the algebra is tested in float64
    network = network.double()
    where = torch.as_tensor(points, dtype=torch.float64)
    with torch.inference_mode():
        network(where)  # what is folded here serves later, with gradients, too
    folded = network(where.requires_grad_())
    folded.sum().backward()
    assert float(where.grad.abs().max()) > 0
    features = network.features(where)
    x = features
    for i, linear in enumerate(network.linears):
        x = linear(torch.cat([x, features], dim=1) if i in (6, 12) else x)
        if i < 17:
            x = torch.relu(network.norms[i](x))
    assert torch.allclose(folded, x[:, 0], atol=1e-10)
    assert torch.allclose(single.double(), x[:, 0], atol=1e-3)
    assert float(folded.detach().std()) > 0.05


def test_a_network_is_rebuilt_from_its_config_and_weights():
    points, values = samples()
    network, _ = fit_paper(points, values, SMALL, seed=1)
    again = PaperNetwork(**network.config()).eval()
    where = torch.as_tensor(points, dtype=torch.float32)
    before = again(where)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(where), network(where))
    assert not torch.equal(before, again(where))


def test_same_seed_same_network_another_seed_another():
    points, values = samples()
    where = torch.as_tensor(points, dtype=torch.float32)
    a, b, c = (fit_paper(points, values, SMALL, seed=s)[0](where) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("kill_at", [3, 5, 13])
def test_resumed_training_ends_with_the_same_bits(tmp_path, monkeypatch, kill_at):
    points, values = samples()
    unseen = samples(50, seed=5)
    whole, history = fit_paper(points, values, SMALL, seed=4, held_out=unseen)
    step = paper2021._Training.step

    def mortal(self):
        if self.steps == kill_at:
            raise Killed
        step(self)

    monkeypatch.setattr(paper2021._Training, "step", mortal)
    common = {"seed": 4, "held_out": unseen, "checkpoint": tmp_path, "checkpoint_seconds": 0.0}
    with pytest.raises(Killed):
        fit_paper(points, values, SMALL, **common)
    monkeypatch.setattr(paper2021._Training, "step", step)
    with safe_open(tmp_path / paper2021.CHECKPOINT, framework="pt") as file:
        assert f'"steps": {kill_at}' in file.metadata()["record"]
    resumed, resumed_history = fit_paper(points, values, SMALL, **common)
    assert resumed_history == history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert [p.name for p in tmp_path.iterdir()] == [paper2021.CHECKPOINT]


def test_a_checkpoint_of_other_data_is_not_taken(tmp_path):
    points, values = samples()
    fit_paper(points, values, SMALL, seed=4, checkpoint=tmp_path)
    fresh, history = fit_paper(points, values + 1, SMALL, seed=4)
    other, other_history = fit_paper(points, values + 1, SMALL, seed=4, checkpoint=tmp_path)
    assert history == other_history
    where = torch.as_tensor(points, dtype=torch.float32)
    assert torch.equal(fresh(where), other(where))


def test_few_voxels_are_one_batch_and_wrong_shapes_are_refused():
    points, values = samples(60)
    _, history = fit_paper(points, values, SMALL, seed=0)
    assert history["step"] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="expected"):
        fit_paper(points, values[:-1], SMALL, seed=0)


@pytest.mark.gpu
def test_recorded_steps_are_those_taken_one_by_one(cuda: str, monkeypatch, caplog) -> None:
    points, values = samples(2000)
    settings = replace(SMALL, epochs_2021=8)  # of 20 steps; the rate changes after recording
    _, history = fit_paper(points, values, settings, seed=1, device=cuda)
    assert "cannot be recorded" not in caplog.text
    monkeypatch.setattr(paper2021._Training, "_record", lambda _: None)
    _, expected = fit_paper(points, values, settings, seed=1, device=cuda)
    assert history["step"] == expected["step"]
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-2)


@pytest.mark.gpu
def test_a_training_on_a_gpu_is_taken_up_again(cuda: str, tmp_path) -> None:
    points, values = samples(2000)
    _, expected = fit_paper(points, values, SMALL, seed=1, device=cuda)
    half = replace(SMALL, epochs_2021=3)
    fit_paper(points, values, half, seed=1, device=cuda, checkpoint=tmp_path)
    _, history = fit_paper(points, values, SMALL, seed=1, device=cuda, checkpoint=tmp_path)
    assert history["step"] == expected["step"]
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-2)
