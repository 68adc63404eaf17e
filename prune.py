"""Fewer experts after the training: which to keep, and a model without the rest.

    experts = kept(model, 4)         # the 4 most important experts of each layer
    experts = kept(model, 0.5)       # half of all experts, wherever they are
    smaller = prune(model, experts)  # of a dict, path -> numbers; model is left alone

An expert's importance is |lambda_i| |a_i| |b_i|, the Frobenius norm of what it adds to the weight;
an expert with a fixed mask has none. Nothing is trained again and nothing scaled. A pruned layer
is a layer of a smaller rank, 0 too; the ranks go into config.json, and `shrink` makes a model of
these ranks to load such an adapter into.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from files import ModelError, RunError, check_shape, new, write_json
from masking import mlae_layers
from mlae import MLAELinear
from model import save_adapter


def layers_of(model: nn.Module) -> dict[str, MLAELinear]:
    """The layers with experts by path; ModelError if there are none, or they have no lambda."""
    found = mlae_layers(model)
    if not found or not all(hasattr(layer, "lora_lambda") for layer in found.values()):
        method = getattr(model, "method", type(model).__name__)
        raise ModelError(f"--prune: {method} has no experts with a lambda of their own")
    return found


@torch.no_grad()
def importance(layer: MLAELinear) -> Tensor:
    """|m_i lambda_i| |a_i| |b_i| (rank,) in float64."""
    coefficient = layer.lora_lambda * layer.expert_mask
    rows = layer.lora_A.double().norm(dim=1)
    columns = layer.lora_B.double().norm(dim=0)
    return coefficient.double().abs() * rows * columns


def kept(model: nn.Module, amount: int | float) -> dict[str, list[int]]:
    """Path -> numbers of the experts that stay, in their order; of equals the first.

    A whole `amount` is the number of experts of each layer, a fraction the share over all layers,
    of which a layer may then keep none. Raises ModelError for a number above the rank, or without
    experts to prune.
    """
    scores = {}
    for name, layer in layers_of(model).items():
        scores[name] = importance(layer)
    if isinstance(amount, int):
        most = max(len(values) for values in scores.values())
        if not 1 <= amount <= most:
            raise ModelError(f"--prune {amount}: a layer has {most} experts")
        return {name: _largest(values, amount) for name, values in scores.items()}
    overall = torch.cat(list(scores.values()))  # (experts of all layers,)
    count = max(1, round(amount * len(overall)))
    stays = torch.zeros(len(overall), dtype=torch.bool)
    stays[_largest(overall, count)] = True
    numbers = {}
    sizes = [len(values) for values in scores.values()]
    for name, own in zip(scores, stays.split(sizes), strict=True):
        numbers[name] = own.nonzero().flatten().tolist()
    return numbers


def _largest(values: Tensor, count: int) -> list[int]:
    order = values.argsort(descending=True, stable=True)
    return sorted(order[:count].tolist())


def prune(model: nn.Module, experts: dict[str, list[int]]) -> nn.Module:
    """A copy of the model whose layers hold these experts alone."""
    smaller = copy.deepcopy(model)
    for name, numbers in experts.items():
        _select(smaller.get_submodule(name), numbers)
    return smaller


def shrink(model: nn.Module, ranks: dict[str, int]) -> None:
    """Give a new model's layers, in place, the ranks of a pruned run; RunError if they are not
    ranks of its layers."""
    layers = layers_of(model)
    check_shape(ranks, dict, "config.json: ranks")
    if ranks.keys() != layers.keys():
        raise RunError("config.json: ranks are not of the layers that the run adapts")
    for name, rank in ranks.items():
        most = layers[name].rank
        check_shape(rank, range(most + 1), f"config.json: ranks: {name}")
        _select(layers[name], list(range(rank)))


@torch.no_grad()
def _select(layer: MLAELinear, numbers: list[int]) -> None:
    smaller = {
        "lora_A": layer.lora_A[numbers],
        "lora_B": layer.lora_B[:, numbers],
        "lora_lambda": layer.lora_lambda[numbers],
    }
    for name, values in smaller.items():
        trains = getattr(layer, name).requires_grad
        parameter = nn.Parameter(values.contiguous(), requires_grad=trains)
        setattr(layer, name, parameter)
    layer.expert_mask = layer.expert_mask[numbers]
    layer.rank = len(numbers)


def ladder(rank: int) -> list[int]:
    """rank, rank / 2 and so on, rounded down, to 1."""
    steps = []
    while rank:
        steps.append(rank)
        rank //= 2
    return steps


def size(model: nn.Module) -> tuple[int, int]:
    """(experts, parameters of the experts) over all layers of a model, its head not counted."""
    experts = parameters = 0
    for layer in layers_of(model).values():
        experts += layer.rank
        parameters += layer.lora_A.numel()
        parameters += layer.lora_B.numel()
        parameters += layer.lora_lambda.numel()
    return experts, parameters


def table(model: nn.Module, amounts: Sequence[int | float]) -> dict[int | float, dict]:
    """Amount -> the experts that are `kept`. One amount is seen among all of its `ladder`."""
    if len(amounts) == 1:
        steps = ladder(max(layer.rank for layer in layers_of(model).values()))
        amounts = sorted({*steps, *amounts}, reverse=True)
    rows = {}
    for amount in amounts:
        rows[amount] = kept(model, amount)
    return rows


def print_table(
    model: nn.Module, rows: dict[int | float, dict], top1: Callable[[nn.Module], float]
) -> None:
    """Print a line for each of `table`: what is kept, its share of the parameters, top-1 (%)."""
    _, whole = size(model)
    print("  kept  experts  parameters   share   top-1")
    for amount, numbers in rows.items():
        smaller = prune(model, numbers)
        experts, parameters = size(smaller)
        share = parameters / whole
        print(f"{amount:>6}  {experts:7}  {parameters:10,}  {share:6.1%}  {top1(smaller):6.2f}")


def write(folder: Path, smaller: nn.Module, config: dict, amount: int | float) -> None:
    """Write a pruned run that `eval.load_run` reads: config.json with the ranks, and the adapter.

    It has no metrics.json: tables of runs leave it out.
    """
    ranks = {}
    for name, layer in layers_of(smaller).items():
        ranks[name] = layer.rank
    config = config | {"arguments": vars(config["arguments"]), "ranks": ranks}
    config["identity"] = config.get("identity", {}) | {"pruned": amount}
    with new(folder, "--out") as draft:
        draft.mkdir()
        save_adapter(smaller, draft / "adapter.safetensors", config)
        write_json(draft / "config.json", config)
