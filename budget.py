"""How many parameters a method trains, and the rank that comes nearest to a number of them.

sizes = {f"blocks.{i}.attn.qkv": (768, 2304) for i in range(12)}
adapter_size("mlae", sizes, rank=8)     # 294,912 in the factors, 96 in lambda
nearest_rank("snell", sizes, 300_000)
"""

from __future__ import annotations

import argparse

from backbone import ModelError, create_backbone
from baselines import METHODS
from model import find_layers


def adapter_size(method: str, sizes: dict[str, tuple[int, int]], **settings) -> int:
    """How many parameters a method trains in layers {path: (in_features, out_features)}."""
    row, count = METHODS[method], 0
    own = row.own(settings)
    plan = row.plan(list(sizes), own)
    for (inputs, outputs), keywords in zip(sizes.values(), plan, strict=True):
        layer = row.layer(inputs, outputs, device="meta", **keywords)
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad and name not in row.fixed(own):
                count += parameter.numel()
    return count


def nearest_rank(method: str, sizes: dict[str, tuple], budget: int, **settings) -> int:
    """The rank at which `adapter_size` comes nearest to a number of parameters.

    Raises ValueError for a method that has no rank, or no layers.
    """
    if "rank" not in METHODS[method].settings or not sizes:
        raise ValueError(f"{method} has no rank to choose")
    off = {}  # rank -> how far it is from the budget
    highest = min(map(min, sizes.values()))
    for rank in range(1, highest + 1):
        try:
            off[rank] = adapter_size(method, sizes, **settings, rank=rank) - budget
        except ValueError:
            if rank % 2 == 0:  # a kernel refuses odd ranks; another setting is wrong
                raise
        if off.get(rank, -1) >= 0:
            break
    else:
        raise ValueError(f"{budget:,} parameters are more than full rank has")
    return min(off, key=lambda rank: abs(off[rank]))


def rank_within(args: argparse.Namespace) -> int:
    """The rank at which a run's adapters come nearest to args.budget parameters, head not counted.

    Raises ModelError for a method without a rank.
    """
    plain = create_backbone(args.model, 1, pretrained=False, img_size=args.img_size)
    sizes = {}
    for name, rows in find_layers(plain, args.targets).items():
        linear = plain.get_submodule(name)
        sizes[name] = linear.in_features, len(rows) if rows else linear.out_features
    names = METHODS[args.method].settings.keys() - {"rank"}
    settings = {name: getattr(args, name) for name in names}
    try:
        rank = nearest_rank(args.method, sizes, args.budget, **settings)
    except ValueError as error:
        raise ModelError(f"--budget: {error}") from error
    count = adapter_size(args.method, sizes, rank=rank, **settings)
    print(f"--budget {args.budget:,}: rank {rank} is nearest, with {count:,} parameters")
    return rank
