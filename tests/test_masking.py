"""MLAE's masks over the layers of a model and over the training."""

import argparse
import itertools
import json
import math
from pathlib import Path

import pytest
import timm
import torch
from conftest import log

import eval as evaluation
import model as models
import runs
import suite
from methods import METHODS
from mlae import PATTERNS, SCHEDULES, expert_similarity, mask_rates

MLAE = METHODS["mlae"]
TWO = {"attn.qkv": 0.5, "mlp.fc1": 0.3}


def make(targets=("attn.qkv",), **settings):
    return models.create("vit_nano", 10, pretrained=False, targets=[*targets], **settings)


def rates(net, target):
    """The masking probabilities of a target's layers, from the first block to the last."""
    found = models.adapters(net).items()
    return [layer.mask_prob for name, layer in found if name.endswith(target)]


PROGRESS = (0.0, 0.1, 0.5, 0.9, 0.95, 1.0)
FACTORS = {
    "constant": [1] * 6,
    "increase": PROGRESS,
    "decrease": [1, 0.9, 0.5, 0.1, 0.05, 0],
    "cosine": [(1 + math.cos(t * math.pi)) / 2 for t in PROGRESS],
    "off-at-end": [1, 1, 1, 1, 0.5, 0],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_their_formulas_for_every_target(schedule):
    net = make(TWO, schedule=schedule, pattern="incremental", mask_prob=TWO)
    for progress, factor in zip(PROGRESS, FACTORS[schedule], strict=True):
        MLAE.before_step(net, progress)
        assert MLAE.after_epoch(net)["mask_prob"] == pytest.approx(0.4 * factor, abs=1e-6)
        for target, p in TWO.items():
            want = mask_rates("incremental", 6, p * factor).tolist()
            assert rates(net, target) == pytest.approx(want)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_target_has_its_own_p_as_the_mean_of_its_layers(pattern):
    net = make(reversed(TWO), mask_prob=TWO, pattern=pattern)
    for target, p in TWO.items():
        assert rates(net, target) == mask_rates(pattern, 6, p).tolist()


@pytest.mark.parametrize("masking", ["stochastic", "fixed", "mixed"])
def test_masks_of_each_target_are_drawn_at_every_step_or_for_good(masking):
    net = make(TWO, mask_prob={"attn.qkv": 0.75, "mlp.fc1": 0.25}, masking=masking)
    for name, layer in models.adapters(net).items():
        p, kept = (0.75, 2) if name.endswith("qkv") else (0.25, 6)
        assert layer.mask_prob == (0 if masking == "fixed" else p)
        assert layer.expert_mask.sum() == (8 if masking == "stochastic" else kept)


def test_one_number_for_all_layers_is_not_one_for_each_target():
    one = make(TWO, mask_prob=0.5, pattern="incremental")
    each = make(TWO, mask_prob=dict.fromkeys(TWO, 0.5), pattern="incremental")
    everywhere = [layer.mask_prob for layer in models.adapters(one).values()]
    assert everywhere == mask_rates("incremental", 12, 0.5).tolist()
    assert rates(each, "qkv") == rates(each, "fc1") != rates(one, "qkv")


def test_the_order_of_the_targets_changes_nothing():
    both, found = {"qkv": 0.2, "attn.q": 0.2}, []
    for pairs in (both.items(), reversed(both.items())):
        net = timm.create_model("cait_xxs24_224", img_size=32, depth=1)  # it has layers of both
        models.inject(net, ["attn.q"], mask_prob=dict(pairs), pattern="decremental")
        found.append(rates(net, ""))
    assert found[0] == found[1] == mask_rates("decremental", 3, 0.2).tolist()


def test_parts_of_a_fused_layer_share_its_masks():
    net = make(["attn.q", "attn.v"], mask_prob={"attn.q": 0.2, "attn.v": 0.2})
    assert rates(net, "qkv") == [0.2] * 6


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"mask_prob": {"attn.qkv": 0.5}}, "blocks.0.mlp.fc1"),
        ({"mask_prob": {**TWO, "mlp.fc2": 0.1}}, "mlp.fc2"),
        ({"mask_prob": {**TWO, "qkv": 0.1}}, "attn.qkv and qkv"),
        ({"mask_prob": {"attn.qkv": 0.5, "mlp.fc1": 1.0}}, "1.0"),
        ({"mask_prob": {}}, "blocks.0.attn.qkv"),
        ({"masking": "fixed", "schedule": "increase"}, "schedule"),
    ],
)
def test_masks_that_are_not_to_be_had(settings, word):
    with pytest.raises(models.ModelError, match=word):
        make(TWO, **settings)


def test_train_takes_one_setting_and_suite_several():
    words = ["--mask-prob", "0.3", "mlp.fc1=0.3,attn.qkv=0.5", "attn.qkv=0"]
    several = suite.suite_parser().parse_args(words).mask_prob
    assert several == [0.3, TWO, {"attn.qkv": 0.0}]
    for value in several:  # what tables show can be typed
        typed = runs.train_parser().parse_args(["--mask-prob", runs.shown(value)])
        assert typed.mask_prob == value


@pytest.mark.parametrize(
    "word", ["mlp.fc1=0.3,mlp.fc1=0.5", "0.3,0.5", "../x=0.3", "=0.3", "fc1=", "fc1=1", "fc1=half"]
)
def test_flags_that_are_not_to_be_had(capsys, word):
    with pytest.raises(SystemExit) as stop:
        runs.train_parser().parse_args(["--mask-prob", word])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "--mask-prob" in err


def test_a_run_with_a_probability_for_each_target(run):
    words = ["--targets", *TWO, "--mask-prob", "attn.qkv=0.5", "mlp.fc1=0.3", "--rank", 3]
    words += ["--mask-schedule", "decrease", "--mask-pattern", "incremental"]
    metrics = run(*words)
    path = Path(metrics["run"], "config.json")
    net, config = evaluation.load_run(metrics["run"])
    assert config["arguments"].mask_prob == TWO and rates(net, "fc1")[-1] == 0
    one, two = log(metrics)
    assert [one["mask_prob"], two["mask_prob"]] == ["0.2", "0"]
    saved = MLAE.after_epoch(net)["similarity"]
    assert float(two["similarity"]) == pytest.approx(saved, rel=1e-6)
    assert one["similarity"] != two["similarity"] and 0 < saved < 1
    assert run(*words) == metrics  # it is found again
    assert "mlae" in suite.tabulate(suite.rows_of(suite.read_runs("runs")))
    arguments = json.loads(path.read_text())["arguments"]
    for wrong in (
        {"mask_prob": {"attn.qkv": None, "mlp.fc1": 0.3}},
        {"mask_prob": {"attn.qkv": -1}},
        {"mask_prob": {}},
        {"coef_init": {"attn.qkv": 1.0}},
    ):
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "arguments": arguments | wrong})
        )
        with pytest.raises(runs.RunError, match=next(iter(wrong)).replace("_", "-")):
            evaluation.read_config(path.parent)


def test_choosing_among_numbers_and_targets():
    trials = []
    for p, top1 in ((TWO, 60.0), (0.3, 60.0), (0.6, 50.0)):
        settings = argparse.Namespace(dataset="dtd", method="mlae", mask_prob=p, seed=0)
        trials.append((settings, {"val_top1": top1}))
    for order in itertools.permutations(trials):
        (best,) = suite.choose(list(order), ["mask_prob"], [])
        assert best["mask_prob"] == 0.3  # it is below the mean 0.4


def test_the_logged_similarity_is_the_mean_over_pairs_and_layers():
    net = make(["mlp.fc1"], rank=3)
    means = []
    for number, layer in enumerate(models.adapters(net).values()):
        torch.nn.init.normal_(layer.lora_B)
        cosines = expert_similarity(layer).abs()
        pairs = [cosines[0, 1], cosines[0, 2], cosines[1, 2]]
        if number == 0:
            layer.expert_mask[2] = 0  # for good: it has no pairs
            pairs = pairs[:1]
        means.append(sum(pairs).item() / len(pairs))
    want = pytest.approx(sum(means) / len(means), abs=1e-6)
    assert METHODS["lora"].after_epoch(net) == {"similarity": want}
    assert MLAE.after_epoch(net)["similarity"] == want
    assert MLAE.after_epoch(make(rank=1))["similarity"] == 0  # one expert has no pair


def test_the_log_has_the_share_that_is_masked_by_either_mask(run):
    for masking, share in (("stochastic", 0.5), ("fixed", 0.5), ("mixed", 0.75)):
        rows = log(run("--masking", masking, "--epochs", 1))
        assert float(rows[0]["mask_prob"]) == share
