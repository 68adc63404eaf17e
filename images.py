"""Images: lists and files as they lie on disk, decoding, batches, memory and the cache.

train.prepare(device)                               # decoded once, then read from a cache
for x, y in train.epoch(order, 64, seed="0 0"): ... # (B, 3, S, S) uint8, (B,)
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import math
import multiprocessing
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import functional as TF
from tqdm import tqdm

from files import regular
from splits import DataError
from views import BICUBIC, VIEWS, mirrored, upright

# what Pillow may open; it would start other programs for some (Ghostscript for EPS)
READABLE = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
FEW = 5e6  # pixels that are decoded before a worker process has started
Item = Path | bytes | np.ndarray  # a file, an encoded image, or pixels (H, W) or (H, W, 3) of uint8


def open_image(item: Item) -> Image.Image:
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    file = io.BytesIO(item) if isinstance(item, bytes) else regular(item)
    return Image.open(file, formats=READABLE)


def image_format(item: Item, where: str) -> str:
    """The file format of an image, by its header; DataError, naming `where`, without one."""
    try:
        with open_image(item) as image:
            return image.format
    except Exception as error:  # whatever a damaged file makes Pillow raise
        absent = isinstance(error, FileNotFoundError)
        reason = "does not exist" if absent else f"is not a readable image ({type(error).__name__})"
        raise DataError(f"{where}: {_name(item)} {reason}; unpack the archive again") from None


def _name(item: Item) -> str:
    return str(item) if isinstance(item, Path) else "in its file"


def find(root: Path, pattern: str, depth: int = 4) -> Path | None:
    """The first match of a pattern in a folder and the levels below it, `depth` in all."""
    for level in range(depth):
        matches = root.glob("*/" * level + pattern)
        found = sorted(path for path in matches if path.is_file() or path.is_dir())
        if found:
            return found[0]
    return None


def lines(listing: Path) -> list[tuple[str, str]]:
    """("<file>, line <n>", line) of each line that is not blank; DataError without a file."""
    try:
        text = regular(listing).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "the folder is damaged, unpack it again"
        raise DataError(f"no list {listing} ({error}): {remedy}") from None
    numbered = enumerate(map(str.strip, text.splitlines()), 1)
    return [(f"{listing}, line {number}", line) for number, line in numbered if line]


def within(name: str, where: str | Path) -> str:
    """The relative path `name`, if it stays in its folder; else DataError."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{where}: {name} leads out of the task's folder")
    return name


class Images(Dataset):
    """One selection of a task's images, such as its 1000 training images.

    Item i is (image (3, S, S) uint8, label int), the same at every reading: the test view, or with
    `seed` set, one that is drawn by the seed and i alone.

    Attributes: `items` (N), `labels` (N,) int64, `augment` (a key of VIEWS), `upright` (whether
    EXIF's orientation counts), `source` ("original", "prepared", "lists", "embedded", "folder"),
    `official` (whether this is the benchmark's own split, whole, as far as it can be proven; of a
    folder, whether all of it is read), `digests` (sha256 of the keys, or labels, of each slice),
    `description` (that for people, no more), `cache` (a file), `role` ("train", "val", "test"); of
    a folder: `folder`, `class_names`, `left_out` (how many could not be read).
    """

    source = description = role = ""
    official = False
    cache: Path | None = None
    class_names: Sequence[str] | None = None
    folder: str | None = None
    left_out = 0

    def __init__(
        self,
        items: Sequence,
        labels: Iterable[int],
        img_size: int,
        *,
        augment: str = "none",
        upright: bool = False,
    ) -> None:
        self.items = self.files = items  # `items` become arrays in memory, `files` stay
        self.labels = torch.as_tensor(np.asarray(labels), dtype=torch.long)
        self.img_size = img_size
        self.augment = augment
        self.upright = upright
        self.digests: dict[str, str] = {}
        self.view = VIEWS[augment]
        # the resized image's short side before the crop: 256 for 224
        self.short = round(img_size * self.view.margin) if self.view.margin else None
        self.seed = None
        self.prepared = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = self._scaled(i)
        if self.seed is None:
            image = self.view.test(image, self.img_size)
        else:
            image = self.view.draw(image, self.img_size, f"{self.seed} {i}")
        return TF.pil_to_tensor(image), int(self.labels[i])

    def __getitems__(self, indexes: list[int]) -> list[tuple[Tensor, int]] | DataError:
        """Items, or the error: an exception raised in a worker would arrive as a traceback."""
        try:
            return [self[i] for i in indexes]
        except DataError as error:
            return error

    def _scaled(self, i: int) -> Image.Image:
        """Image i in RGB, at S x S, or before a crop with its short side at the crop's measure."""
        item = self.items[i]
        try:
            image = open_image(item)
            if self.upright:
                image = upright(image)
            image = image.convert("RGB")
        except Exception as error:  # whatever a damaged file makes Pillow raise
            raise DataError(f"cannot read image {_name(item)}: {error}; get it again") from error
        return TF.resize(image, self.short or [self.img_size, self.img_size], BICUBIC)

    def prepare(self, device: torch.device | str = "cpu", workers: int = 4) -> None:
        """Decode what every epoch needs, if it fits: all images on `device`, or before a crop."""
        if self.short:
            self.hold(workers)
        elif self._fits(3 * len(self) * self.img_size**2, free_memory(device) // 2):
            self.prepared = self.tensors(device, workers)

    def epoch(
        self, order: Tensor, batch_size: int, workers: int = 4, seed: str = "0"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches, (B, 3, S, S) uint8 and labels (B,), in the order (N,) given; augmented
        images are the same for the same seed and index whatever the workers."""
        if self.prepared is not None:
            images, labels = self.prepared
            for rows in order.to(images.device).split(batch_size):
                batch = images[rows]
                if self.augment == "flip":
                    keys = [f"{seed} {row}" for row in rows.tolist()]
                    mirror = torch.tensor(list(map(mirrored, keys)), device=batch.device)
                    batch = torch.where(mirror[:, None, None, None], batch.flip(-1), batch)
                yield batch, labels[rows]
            return
        view = copy.copy(self)
        view.seed = seed
        yield from view._load(order.tolist(), batch_size, workers)

    def batches(self, batch_size: int, workers: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
        """The test view in order, (B, 3, S, S) uint8 and labels (B,), decoded by `workers`
        processes (0: by this one)."""
        yield from self._load(range(len(self)), batch_size, workers)

    def _load(self, order: Sequence[int], batch_size: int, workers: int) -> Iterator:
        can_fork = "fork" in multiprocessing.get_all_start_methods()
        if not can_fork and not isinstance(self.items[0], Path):
            workers = 0  # each process would be sent all pixels
        if len(order) * self.img_size**2 < FEW:
            workers = 0
        workers = min(workers, cores())
        batches = DataLoader(
            self,
            batch_size,
            sampler=order,
            num_workers=workers,
            collate_fn=_collate,
            multiprocessing_context="fork" if workers and can_fork else None,
            generator=torch.Generator(),  # else an epoch draws from the run's random numbers
        )
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch

    def tensors(
        self, device: torch.device | str = "cpu", workers: int = 4
    ) -> tuple[Tensor, Tensor]:
        """The test view of all images on `device`, (N, 3, S, S) uint8, and labels (N,) int64;
        decoded once, then read from the cache."""

        def decode() -> dict[str, Tensor]:
            images = torch.empty(len(self), 3, self.img_size, self.img_size, dtype=torch.uint8)
            start = 0
            for batch, _ in self._bar(self.batches(50, workers), math.ceil(len(self) / 50)):
                images[start : start + len(batch)] = batch
                start += len(batch)
            return {"images": images}

        return self._cached(decode)["images"].to(device), self.labels.to(device)

    def hold(self, workers: int = 4, limit: int | None = None) -> bool:
        """Keep the images in memory, (H, W, 3) uint8 with the short side that the test view has
        before its crop, so that an epoch decodes nothing. Says how much that takes; does nothing
        above `limit` bytes (default: half of the free memory). True if they are held."""
        need = 0
        for item in self.files:
            with open_image(item) as image:
                width, height = image.size
            long_side = int(self.short * max(width, height) / min(width, height))
            need += 3 * self.short * long_side
        if not self._fits(need, free_memory() // 2 if limit is None else limit):
            return False
        on_disk = f", and as much on disk in {self.cache}" if self.cache else ""
        takes = f"{len(self)} images at {self.short} pixels take {need / 2**30:.2f} GiB"
        print(f"{takes} of memory{on_disk}")

        def decode() -> dict[str, Tensor]:
            with ThreadPoolExecutor(min(workers, cores()) or 1) as pool:  # side by side
                images = pool.map(self._scaled, range(len(self)))
                arrays = [np.array(image) for image in self._bar(images, len(self))]
            return {str(i): torch.from_numpy(array) for i, array in enumerate(arrays)}

        held = self._cached(decode)
        self.items = [held[str(i)].numpy() for i in range(len(self))]
        return True

    def _fits(self, need: int, limit: int) -> bool:
        """Whether so many bytes are within the limit; says so if they are not."""
        if need > limit:
            takes = f"{len(self)} images take {need / 2**30:.2f} GiB of memory"
            print(f"{takes}, over the limit of {limit / 2**30:.2f}: read from the files")
        return need <= limit

    def _bar(self, items: Iterable, total: int) -> Iterable:
        return tqdm(items, f"decoding {len(self)} images", total, disable=None)

    def fingerprint(self) -> str:
        """A digest of size, labels and files with their times of change: for what is kept on this
        machine, the cache and a run's state."""
        return self._sha256(f"{self.img_size} {self.short}", lambda path: f"{path}", True)

    def digest(self) -> str:
        """A digest of labels and images, these by value, or by name and length of their files:
        the same wherever and whenever they are read, and at every image size."""
        top = ""
        if isinstance(self.files[0], Path):
            top = os.path.commonpath([path.parent for path in self.files])
        return self._sha256("", lambda path: path.relative_to(top).as_posix(), False)

    def _sha256(self, head: str, name: Callable[[Path], str], with_time: bool) -> str:
        digest = hashlib.sha256(head.encode())
        digest.update(self.labels.numpy())
        if isinstance(self.files, np.ndarray):
            digest.update(np.ascontiguousarray(self.files))
            return digest.hexdigest()
        for item in self.files:
            if isinstance(item, Path):
                stat = item.stat()
                time = f" {stat.st_mtime_ns}" if with_time else ""
                item = os.fsencode(f"{name(item)} {stat.st_size}{time}\n")
            digest.update(item)
        return digest.hexdigest()

    def _cached(self, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` returns, from the cache file if that is whole and of these very images, else
        made and written."""
        if self.cache is None:
            return make()
        key = self.fingerprint()
        try:
            with safe_open(regular(self.cache), "pt") as file:
                if file.metadata()["key"] == key:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                    if file.metadata()["crc32"] == _crc32(tensors):
                        return tensors
        except (OSError, SafetensorError, KeyError, TypeError):
            pass  # none yet, or damaged
        tensors = make()
        unfinished = self.cache.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.cache.parent.mkdir(exist_ok=True)
            unfinished.touch()
            mode = unfinished.stat().st_mode  # the umask's; safetensors would leave it private
            save_file(tensors, unfinished, {"key": key, "crc32": _crc32(tensors)})
            unfinished.chmod(mode)
            os.replace(unfinished, self.cache)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            print(f"decoded images are not kept: cannot write {self.cache} ({error})")
        return tensors


def _collate(items: list[tuple[Tensor, int]] | DataError) -> list[Tensor] | DataError:
    return items if isinstance(items, DataError) else default_collate(items)


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that a device has to spare, as far as it tells."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if (meminfo := Path("/proc/meminfo")).exists():  # "available": with files that may be let go
        free = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())
        return (int(free[1]) << 10) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's
    has_it = hasattr(os, "sysconf")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if has_it else 8 << 30


def _crc32(tensors: dict[str, Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].numpy(), crc)
    return f"{crc:08x}"
