"""The table of methods: what stands in its rows is all that a method is."""

import ast
import re
from pathlib import Path

import pytest
import torch

import baselines
import model as models
from baselines import METHODS

ROOT = Path(baselines.__file__).parent


@pytest.mark.parametrize("method", METHODS)
def test_a_row_tells_what_trains(method):
    net = models.create("vit_nano", 10, pretrained=False, method=method)
    assert net.method == method and net.method_settings == METHODS[method].settings
    layers = models.adapters(net)
    targets = METHODS[method].targets if METHODS[method].layer else ()
    assert len(layers) == 6 * len(targets)
    for layer in layers.values():
        for name in METHODS[method].fixed(net.method_settings):
            assert not getattr(layer, name).requires_grad


def test_settings_of_other_methods_are_ignored_and_unknown_ones_are_not():
    net = models.create("vit_nano", 10, pretrained=False, method="linear", rank=4, mask_prob=0.1)
    assert net.method_settings == {}
    with pytest.raises(TypeError, match="no method has a setting 'rnak'"):
        models.create("vit_nano", 10, pretrained=False, rnak=4)


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ("constant", [0.5, 0.5, 0.5]),
        ("increase", [0, 0.25, 0.5]),
        ("decrease", [0.5, 0.25, 0]),
        ("cosine", [0.5, 0.25, 0]),
        ("off-at-end", [0.5, 0.5, 0]),
    ],
)
def test_schedules_move_the_mean_masking_probability(schedule, want):
    settings = {"schedule": schedule, "pattern": "incremental"}
    net = models.create("vit_nano", 10, pretrained=False, **settings)
    for progress, p in zip((0.0, 0.5, 1.0), want, strict=True):
        METHODS["mlae"].before_step(net, progress)
        assert METHODS["mlae"].log(net)["mask_prob"] == pytest.approx(p, abs=1e-6)
        rates = [layer.mask_prob for layer in baselines.mlae_layers(net)]
        assert rates == sorted(rates, reverse=True)  # more active experts with depth


def test_fixed_masks_have_no_schedule():
    with pytest.raises(models.ModelError, match="schedule increase needs masking stochastic"):
        models.create("vit_nano", 10, pretrained=False, masking="fixed", schedule="increase")


def test_hooks_of_a_compiled_model_reach_the_layers():
    net = models.create("vit_nano", 10, pretrained=False, schedule="increase")
    METHODS["mlae"].before_step(torch.compile(net, backend="eager"), 0.5)
    assert METHODS["mlae"].log(net)["mask_prob"] == 0.25


def test_off_at_end_goes_to_zero_over_the_last_tenth():
    factor = baselines.SCHEDULES["off-at-end"]
    assert [factor(t) for t in (0.0, 0.5, 0.9)] == [1, 1, pytest.approx(1)]
    assert factor(0.95) == pytest.approx(0.5) and factor(1.0) == 0


def test_similarity_of_the_experts_by_hand():
    net = models.create("vit_nano", 10, pretrained=False, rank=3, targets=["mlp.fc1"])
    for number, layer in enumerate(baselines.mlae_layers(net)):
        with torch.no_grad():
            layer.lora_A.copy_(torch.randn(3, 96))
            layer.lora_B.copy_(torch.randn(384, 3))
        if number == 0:
            layer.expert_mask[2] = 0  # for good: it has no pairs
    means = []
    for number, layer in enumerate(baselines.mlae_layers(net)):
        a, b = layer.lora_A.double(), layer.lora_B.double()
        pairs = []
        for i, j in [(0, 1)] if number == 0 else [(0, 1), (0, 2), (1, 2)]:
            one, two = torch.outer(b[:, i], a[i]), torch.outer(b[:, j], a[j])
            pairs.append(abs((one * two).sum() / one.norm() / two.norm()).item())
        means.append(sum(pairs) / len(pairs))
    want = sum(means) / len(means)
    assert METHODS["lora"].log(net) == {"similarity": pytest.approx(want, rel=1e-5)}
    assert METHODS["mlae"].log(net)["similarity"] == pytest.approx(want, rel=1e-5)


def test_one_expert_has_no_similarity():
    net = models.create("vit_nano", 10, pretrained=False, rank=1)
    assert METHODS["mlae"].log(net)["similarity"] == 0


def test_no_other_script_names_a_method():
    """But flags.py, which says in words what is whose; and snell.py, a layer of baselines.py."""
    for path in ROOT.glob("*.py"):
        if path.name in ("baselines.py", "flags.py", "snell.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = re.findall(r"[a-z_]+", node.value)  # lora_A is a parameter
                is_text = " " in node.value.strip() and len(words) > 3  # help, messages, docs
                named = set(words) & (set(METHODS) - {"linear", "full"})
                assert is_text or not named, f"{path.name}, line {node.lineno}"
                assert node.value not in METHODS, f"{path.name}, line {node.lineno}"
