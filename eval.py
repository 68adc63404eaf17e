"""Score a finished run again, from its own files: as it was trained, and merged into a plain timm model.

    python eval.py runs/digits/mlae-vit_nano-seed0-...

Rebuilds the model of `config.json` with the weights of `adapter.safetensors`, scores it on the run's images (the test
set; val200 after `--val`) and says whether the merged model agrees. Exit code 0 if it does, 1 if not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import model as models


class Parser(argparse.ArgumentParser):
    """Reports a wrong command in one line on stderr, with exit code 2."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a missing network: no line for every retry

    def error(self, message: str) -> None:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA if there is one, else Apple's MPS, else the CPU. ModelError for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in there.items() if present)
    if not there[name]:
        raise models.ModelError(f"--device {name}: there is none here; use --device auto or cpu")
    return torch.device(name)


def provenance(model: nn.Module, checkpoint: str | None, pretrained: bool) -> dict[str, str]:
    """Which pre-trained weights a model has: timm's full tag, or the local file's name and its sha256."""
    if models.architecture(model) == "vit_nano" and pretrained:
        checkpoint = checkpoint or models.NANO_FILE
    if checkpoint:
        return {"tag": f"{models.architecture(model)}:{Path(checkpoint).name}", "sha256": sha256(checkpoint)}
    tag = model.pretrained_cfg.get("tag") if pretrained else "random"
    return {"tag": f"{models.architecture(model)}.{tag}" if tag else models.architecture(model)}


def sha256(path: str | Path) -> str:
    """Hex digest of a checkpoint file; ModelError if there is none."""
    if not Path(path).is_file():
        raise models.ModelError(f"no checkpoint file {path}")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def predict(
    model: nn.Module, images: data.Images, normalize: Callable[[Tensor], Tensor], bf16: bool = False, workers: int = 4
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) in float32 and labels (N,), on the CPU, in eval mode; every module's mode is restored."""
    device = next(model.parameters()).device
    logits, labels = [], []
    with models.eval_mode(model), torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for batch, batch_labels in images.batches(256, workers):
            logits.append(model(normalize(batch)).float())  # (B, classes)
            labels.append(batch_labels)
    return torch.cat(logits).cpu(), torch.cat(labels)


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 accuracy in percent and mean cross-entropy in nats."""
    correct = (logits.argmax(1) == labels).sum().item()
    return {"top1": round(100 * correct / len(labels), 2), "loss": round(F.cross_entropy(logits, labels).item(), 6)}


def evaluate(model: nn.Module, images: data.Images, normalize: Callable, **kwargs) -> dict[str, float]:
    """`score` of `predict`."""
    return score(*predict(model, images, normalize, **kwargs))


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--data-dir", help="where the data are now (default: where they were in training)")
    parser.add_argument("--checkpoint", help="where the backbone's file is now (default: where it was in training)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: the fastest")
    parser.add_argument("--workers", type=int, default=4, help="threads that decode images (default: 4)")
    args = parser.parse_args()
    try:
        agree = check(args)
    except (data.DataError, models.ModelError) as error:
        parser.error(str(error))
    sys.exit(0 if agree else 1)


def check(args: argparse.Namespace) -> bool:
    """Print the scores of a run unmerged and merged; whether the two agree."""
    try:
        config = json.loads((args.run / "config.json").read_text())
        arguments, weights = config["arguments"], config["weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise models.ModelError(f"{args.run} is not a run of train.py: {error}") from None
    device = pick_device(args.device)
    if args.data_dir:
        config["load"]["root"] = args.data_dir
    if args.checkpoint:
        config["create"]["checkpoint"] = args.checkpoint
    _, images = data.load(**config["load"])
    model = models.create(**config["create"])
    there = provenance(model, config["create"]["checkpoint"], config["create"]["pretrained"])
    key = "sha256" if "sha256" in weights else "tag"  # a file may have another name now
    if there.get(key) != weights[key]:
        raise models.ModelError(f"{args.run} was trained on {weights['tag']}, not on {there['tag']} ({key} differs)")
    models.load_adapter(model, args.run / "adapter.safetensors")
    model.to(device)
    normalize = data.normalizer(config["mean"], config["std"], device)

    counts, method, dataset = models.count_parameters(model), arguments["method"], arguments["dataset"]
    print(f"{method} on {dataset}, {weights['tag']}, seed {arguments['seed']}: {images.about}")
    print(f"parameters: {counts['trainable_parameters']:,} trained, of them {counts['head_parameters']:,} in the head")
    if (args.run / "metrics.json").exists():
        metrics, split = json.loads((args.run / "metrics.json").read_text()), "val" if arguments["val"] else "test"
        print(f"reported  top-1 {metrics[f'{split}_top1']:.2f} %   loss {metrics[f'{split}_loss']:.6f}")
    logits = []
    for name, net in (("unmerged", model), ("merged", models.merge(model))):
        output, labels = predict(net, images, normalize, config["bf16"], args.workers)
        scores = score(output, labels)
        print(f"{name:9} top-1 {scores['top1']:.2f} %   loss {scores['loss']:.6f}")
        logits.append(output)
    difference = (logits[0] - logits[1]).abs().max().item()
    agree = difference <= 1e-4
    print(f"largest difference of a logit {difference:.1e}: {'they agree' if agree else 'they do not agree'}")
    return agree


if __name__ == "__main__":
    main()
