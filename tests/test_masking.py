"""MLAE's masks over the layers of a model and over the training."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import log

import eval as evaluation
import methods
import model as models
import runs
import suite
from methods import METHODS
from mlae import PATTERNS, mask_rates

TWO = {"attn.qkv": 0.5, "mlp.fc1": 0.3}


def make(**settings):
    return models.create("vit_nano", 10, pretrained=False, **settings)


def rates(net, target):
    """The masking probabilities of a target's layers, from the first block to the last."""
    found = models.adapters(net).items()
    return [layer.mask_prob for name, layer in found if name.endswith(target)]


# ---- over the training

PROGRESS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
FACTORS = {
    "constant": [1] * 8,
    "increase": PROGRESS,
    "decrease": [1, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0],
    "cosine": [(1 + math.cos(t * math.pi)) / 2 for t in PROGRESS],
    "off-at-end": [1, 1, 1, 1, 1, 1, 0.5, 0],
}


@pytest.mark.parametrize("schedule", methods.SCHEDULES)
def test_schedules_are_their_formulas(schedule):
    net = make(schedule=schedule, pattern="incremental", mask_prob=0.4)
    for progress, factor in zip(PROGRESS, FACTORS[schedule], strict=True):
        METHODS["mlae"].before_step(net, progress)
        mean = METHODS["mlae"].after_epoch(net)["mask_prob"]
        assert mean == pytest.approx(0.4 * factor, abs=1e-6)
        found = rates(net, "attn.qkv")
        assert found == sorted(found, reverse=True)  # more active experts with depth


def test_fixed_masks_have_no_schedule():
    with pytest.raises(models.ModelError, match="schedule increase needs masking stochastic"):
        make(masking="fixed", schedule="increase")


def test_hooks_of_a_compiled_model_reach_the_layers():
    net = make(schedule="increase", targets=[*TWO], mask_prob=TWO)
    METHODS["mlae"].before_step(torch.compile(net, backend="eager"), 0.5)
    assert rates(net, "qkv") == [0.25] * 6 and rates(net, "fc1") == pytest.approx([0.15] * 6)


# ---- over the layers


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_target_has_its_own_p_as_the_mean_of_its_layers(pattern):
    net = make(targets=["mlp.fc1", "attn.qkv"], mask_prob=TWO, pattern=pattern)
    for target, p in TWO.items():
        found = rates(net, target)
        assert found == mask_rates(pattern, 6, p).tolist()
        assert sum(found) / 6 == pytest.approx(p)


def test_fixed_masks_of_each_target_keep_their_share():
    net = make(targets=[*TWO], mask_prob={"attn.qkv": 0.75, "mlp.fc1": 0.25}, masking="mixed")
    for name, layer in models.adapters(net).items():
        p, kept = (0.75, 2) if name.endswith("qkv") else (0.25, 6)
        assert layer.expert_mask.sum() == kept and layer.mask_prob == p


def test_one_number_for_all_layers_is_not_one_for_each_target():
    one = make(targets=[*TWO], mask_prob=0.5, pattern="incremental")
    each = make(targets=[*TWO], mask_prob=dict.fromkeys(TWO, 0.5), pattern="incremental")
    everywhere = [layer.mask_prob for layer in models.adapters(one).values()]
    assert everywhere == mask_rates("incremental", 12, 0.5).tolist()
    assert rates(each, "qkv") == rates(each, "fc1") != rates(one, "qkv")


def test_every_schedule_moves_every_target():
    net = make(targets=[*TWO], mask_prob=TWO, pattern="decremental", schedule="cosine")
    METHODS["mlae"].before_step(net, 0.25)
    for target, p in TWO.items():
        now = p * (1 + math.cos(math.pi / 4)) / 2
        assert rates(net, target) == pytest.approx(mask_rates("decremental", 6, now).tolist())


def test_the_order_of_the_targets_changes_nothing():
    masks = []
    for pairs in (TWO.items(), reversed(TWO.items())):
        torch.manual_seed(0)
        net = make(targets=[*TWO], mask_prob=dict(pairs), masking="fixed")
        masks.append([layer.expert_mask for layer in models.adapters(net).values()])
    assert all(map(torch.equal, *masks))
    names = ["0.attn.qkv", "1.attn.q", "1.mlp"]  # CaiT has both
    for targets in itertools.permutations(["qkv", "attn.q", "mlp"]):
        p = {target: 0.1 if target == "mlp" else 0.2 for target in targets}
        assert methods.groups(names, p) == [(0.2, [0, 1]), (0.1, [2])]


def test_parts_of_a_fused_layer_share_its_masks():
    net = make(targets=["attn.q", "attn.v"], mask_prob={"attn.q": 0.2, "attn.v": 0.2})
    assert rates(net, "qkv") == [0.2] * 6
    assert methods.ends_in("blocks.1.attn.q", "attn.q")
    assert not methods.ends_in("blocks.1.cross_attn.q", "attn.q")
    assert not methods.ends_in("blocks.1.attn.qkv", "attn.proj")


@pytest.mark.parametrize(
    ("p", "message"),
    [
        ({"attn.qkv": 0.5}, "--mask-prob has no value for blocks.0.mlp.fc1, which is adapted"),
        ({**TWO, "mlp.fc2": 0.1}, "--mask-prob mlp.fc2: no adapted layer has a name that ends so"),
        ({**TWO, "qkv": 0.1}, "attn.qkv and qkv share blocks.0.attn.qkv: give them the same"),
        ({"attn.qkv": 0.5, "mlp.fc1": 1.0}, r"mask_prob must be in \[0, 1\), not 1.0"),
        ({}, "has no value for blocks.0.attn.qkv"),
    ],
)
def test_probabilities_that_are_not_to_be_had(p, message):
    with pytest.raises(models.ModelError, match=message):
        make(targets=[*TWO], mask_prob=p)


# ---- as flags


def parsed(*words):
    return runs.train_parser().parse_args(["--mask-prob", *words]).mask_prob


def test_one_setting_in_train_and_several_in_suite():
    assert parsed("0.3") == 0.3 and type(parsed("0")) is float
    assert parsed("mlp.fc1=0.3", "attn.qkv=0.5") == TWO
    assert parsed("mlp.fc1=0.3,attn.qkv=0.5") == parsed("attn.qkv=0.5,mlp.fc1=0.3") == TWO
    words = ["--mask-prob", "0.3", "mlp.fc1=0.3,attn.qkv=0.5", "attn.qkv=0"]
    several = suite.suite_parser().parse_args(words).mask_prob
    assert several == [0.3, TWO, {"attn.qkv": 0.0}]
    for value in several:  # what tables show can be typed
        assert runs.by_target(runs.shown(value)) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0.3", "0.5"], "expected one number, or target=number once for each target; suite.py"),
        (["0.3", "mlp.fc1=0.5"], "expected one number, or target=number once for each target"),
        (["mlp.fc1=0.3", "mlp.fc1=0.5"], "target=number once for each target; suite.py"),
        (["mlp.fc1=0.3,mlp.fc1=0.5"], "once for each target, not mlp.fc1=0.3,mlp.fc1=0.5"),
        (["0.3,0.5"], "expected one number, or target=number once for each target, not 0.3,0.5"),
        (["../x=0.3"], "once for each target, not ../x=0.3"),
        (["=0.3"], "once for each target, not =0.3"),
        (["mlp.fc1="], "once for each target, not mlp.fc1="),
        (["mlp.fc1=1"], "must be in [0, 1), not 1"),
        (["mlp.fc1=nan"], "must be in [0, 1), not nan"),
        (["mlp.fc1=half"], "invalid float value: 'mlp.fc1=half'"),
    ],
)
def test_flags_that_are_not_to_be_had(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        parsed(*words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert "argument --mask-prob: " in err and message in err


def folder(*words):
    args = runs.settle(runs.train_parser().parse_args([*words]))
    return runs.run_folder("runs", runs.identity(args, runs.usual(args))).name


def test_folders_of_old_keep_their_names_and_new_ones_can_be_read():
    assert folder() == "mlae-vit_nano-seed0-6e2c1e"
    assert folder("--mask-prob", "0.3", "--lr", "2e-3") == "mlae-vit_nano-p0.3-lr0.002-seed0-9b42ac"
    assert folder("--lr", "1").startswith("mlae-vit_nano-lr1-seed0-")
    pairs = ["attn.qkv=0.5", "mlp.fc1=0.3"]
    name = folder("--mask-prob", *pairs)
    assert name.startswith("mlae-vit_nano-pattn.qkv=0.5,mlp.fc1=0.3-seed0-")
    assert name == folder("--mask-prob", *reversed(pairs)) != folder("--mask-prob", "0.5")


def test_a_run_with_a_probability_for_each_target(run, capsys):
    words = ["--targets", *TWO, "--mask-prob", "attn.qkv=0.5", "mlp.fc1=0.3", "--epochs", 1]
    metrics = run(*words, "--mask-schedule", "decrease", "--mask-pattern", "incremental")
    assert [row["mask_prob"] for row in log(metrics)] == ["0"]
    path = Path(metrics["run"], "config.json")
    assert json.loads(path.read_text())["arguments"]["mask_prob"] == TWO
    net, config = evaluation.load_run(metrics["run"])
    assert config["arguments"].mask_prob == TWO and rates(net, "fc1")[-1] == 0
    assert run(*words, "--mask-schedule", "decrease", "--mask-pattern", "incremental") == metrics
    rows = suite.rows_of(runs.collect("runs"))
    assert "mlae" in suite.tabulate(rows)
    for wrong in ({"attn.qkv": "0.5"}, {"attn.qkv": -1}, {"attn.qkv": None, "mlp.fc1": 0.3}, {}):
        config = json.loads(path.read_text())
        config["arguments"]["mask_prob"] = wrong
        path.write_text(json.dumps(config))
        with pytest.raises(SystemExit) as stop:
            evaluation.main([metrics["run"], "--device", "cpu"])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and "mask" in err


def test_other_settings_are_not_for_each_target(run):
    metrics = run("--epochs", 1, "--val")
    path = Path(metrics["run"], "config.json")
    config = json.loads(path.read_text())
    config["arguments"]["coef_init"] = {"attn.qkv": 1.0}
    path.write_text(json.dumps(config))
    with pytest.raises(runs.RunError, match="--coef-init"):
        evaluation.read_config(path.parent)


def test_choosing_among_numbers_and_targets(capsys):
    trials = []
    for p, top1 in ((TWO, 60.0), (0.3, 60.0), (0.6, 50.0)):
        arguments = {"dataset": "dtd", "method": "mlae", "mask_prob": p}
        trials.append(suite.Trial(arguments, {0: top1}))
    for order in itertools.permutations(trials):
        assert suite.choose(list(order), ["mask_prob"], []) == [
            trials[1]
        ]  # 0.3 is below the mean 0.4
    assert "mask_prob=attn.qkv=0.5,mlp.fc1=0.3 60.00" in capsys.readouterr().out


def test_a_table_names_the_probabilities_readably():
    rivals = [{"method": "mlae", "mask_prob": p} for p in (TWO, 0.0)]
    words = [suite.label(rival, rival, rivals) for rival in rivals]
    assert words == ["mlae mask_prob=attn.qkv=0.5,mlp.fc1=0.3", "mlae mask_prob=0.0"]


# ---- what the log says


def test_similarity_of_the_experts_by_hand():
    net = make(rank=3, targets=["mlp.fc1"])
    for number, layer in enumerate(methods.mlae_layers(net).values()):
        with torch.no_grad():
            layer.lora_A.copy_(torch.randn(3, 96))
            layer.lora_B.copy_(torch.randn(384, 3))
        if number == 0:
            layer.expert_mask[2] = 0  # for good: it has no pairs
    means = []
    for number, layer in enumerate(methods.mlae_layers(net).values()):
        a, b = layer.lora_A.double(), layer.lora_B.double()
        pairs = []
        for i, j in [(0, 1)] if number == 0 else [(0, 1), (0, 2), (1, 2)]:
            one, two = torch.outer(b[:, i], a[i]), torch.outer(b[:, j], a[j])
            pairs.append(abs((one * two).sum() / one.norm() / two.norm()).item())
        means.append(sum(pairs) / len(pairs))
    want = sum(means) / len(means)
    assert METHODS["lora"].after_epoch(net) == {"similarity": pytest.approx(want, abs=1e-6)}
    assert METHODS["mlae"].after_epoch(net)["similarity"] == pytest.approx(want, abs=1e-6)


def test_one_expert_has_no_similarity():
    assert METHODS["mlae"].after_epoch(make(rank=1))["similarity"] == 0


def test_the_last_similarity_of_the_log_is_that_of_the_saved_experts(run):
    metrics = run("--rank", 3, "--val")
    net, _ = evaluation.load_run(metrics["run"])
    column = [float(row["similarity"]) for row in log(metrics)]
    assert column[-1] == pytest.approx(METHODS["mlae"].after_epoch(net)["similarity"], rel=1e-6)
    assert column[0] != column[1] and 0 < column[-1] < 1
