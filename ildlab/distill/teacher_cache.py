"""The teacher's hidden states on disk: what never changes need not be run again at every iteration.

For each chosen depth the hidden states of a text are kept in bf16 safetensors shards beside a manifest
that names teacher, text and dtype. The final depth serves the loss (the shared head makes logits of
it again); a depth below every layer that trains saves the bottom of both models. A cache of another
teacher or text is refused, never used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ildlab.distill.masters import weights_hash
from ildlab.errors import DistillError
from ildlab.files import atomic_file, write_atomic
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, Work, drive

_ROWS = 64  # rows in a shard


class TeacherCache:
    """An open cache; `build` makes one.

    Parameters
    ----------
    folder : path

    Raises
    ------
    DistillError
        There is no whole cache in the folder.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        try:
            self.manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise DistillError(f"{folder} holds no whole teacher cache ({error}): build it anew.") from error
        self._open: dict[int, Any] = {}

    @property
    def depths(self) -> list[int]:
        """Depths of the hidden states: depth l is the input of the teacher's layer at position l."""
        return self.manifest["depths"]

    def check(self, teacher: LayerStack, text: str) -> None:
        """Raise DistillError where the cache is of another teacher or another text.

        Parameters
        ----------
        teacher : LayerStack
        text : str
            Fingerprint of the blocks.
        """
        if self.manifest["teacher"] != weights_hash(teacher):
            raise DistillError(f"The cache in {self.folder} is of another teacher: delete it and build it anew.")
        if self.manifest["text"] != text:
            raise DistillError(f"The cache in {self.folder} is of another text: delete it and build it anew.")

    def get(self, rows: Tensor) -> dict[int, Tensor]:
        """Hidden states [B, T, d] of some rows of the text, by depth."""
        found = {depth: [] for depth in self.depths}
        for row in rows.tolist():
            shard = self._shard(row // _ROWS)
            for depth in self.depths:
                found[depth].append(shard.get_slice(str(depth))[row % _ROWS])
        return {depth: torch.stack(parts) for depth, parts in found.items()}

    def _shard(self, number: int):
        from safetensors import safe_open

        if number not in self._open:
            self._open[number] = safe_open(self.folder / f"{number:05d}.safetensors", framework="pt").__enter__()
        return self._open[number]

    def delete(self) -> None:
        """Remove the cache's folder."""
        self._open.clear()
        shutil.rmtree(self.folder)


def build_steps(
    teacher: LayerStack,
    blocks: Any,
    folder: Path | str,
    *,
    depths: Sequence[int] = (),
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 8,
    limit_bytes: int = 8 * 2**30,
) -> Work[TeacherCache]:
    """Run the teacher over a text and keep its hidden states; a cache that already fits is opened instead.

    Parameters
    ----------
    teacher : LayerStack
    blocks : TextBlocks or Tensor [N, T]
        The very blocks that will be trained on.
    folder : path
    depths : sequence of int
        Depths beside the final one, which is always kept.
    dtype : torch.dtype
        bf16 halves the size and rounds hidden states to 3 digits.
    batch_size : int
        Rows in one pass.
    limit_bytes : int
        Refuse to write more.

    Raises
    ------
    DistillError
        It would be larger than the limit or than the disk's free space, or the folder holds another cache.
    """
    from safetensors.torch import save_file

    from ildlab.distill.train import _as_rows

    ids, mask, fingerprint = _as_rows(blocks)
    if mask is not None:
        raise DistillError("The teacher cache takes packed blocks without padding.")
    kept = sorted({*depths, len(teacher)})
    wrong = [d for d in kept if not 1 <= d <= len(teacher)]
    if wrong:
        raise DistillError(f"depths={wrong}: a depth lies between 1 and {len(teacher)}.")
    folder = Path(folder)
    wanted = {"teacher": weights_hash(teacher), "text": fingerprint, "dtype": str(dtype), "depths": kept}
    if (folder / "manifest.json").is_file():
        cache = TeacherCache(folder)
        if cache.manifest == wanted:
            return cache
        raise DistillError(
            f"{folder} holds a cache of another teacher, text, dtype or choice of depths: delete it first, or give "
            "another folder."
        )
    rows, block = ids.shape
    size = rows * block * teacher.hidden_size * len(kept) * dtype.itemsize
    if size > limit_bytes:
        raise DistillError(
            f"The cache would take {size / 2**30:.1f} GiB, over the limit of {limit_bytes / 2**30:.1f} GiB: "
            "raise limit_bytes, or use less text or fewer depths."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if size > shutil.disk_usage(folder).free:
        raise DistillError(f"The cache would take {size / 2**30:.1f} GiB, more than is free at {folder}.")
    for start in range(0, rows, _ROWS):
        parts: dict[int, list[Tensor]] = {d: [] for d in kept}
        for low in range(start, min(start + _ROWS, rows), batch_size):
            with torch.no_grad():
                for depth, hidden in enumerate(teacher.walk(ids[low : min(low + batch_size, start + _ROWS)].long())):
                    if depth in parts:
                        parts[depth].append(hidden.to("cpu", dtype))
            yield Progress(min(low + batch_size, rows), rows, "teacher's hidden states")
        with atomic_file(folder / f"{start // _ROWS:05d}.safetensors") as temporary:
            save_file({str(d): torch.cat(p).contiguous() for d, p in parts.items()}, temporary)
    # The manifest comes last: without it the folder is no cache.
    write_atomic(folder / "manifest.json", json.dumps(wanted))
    return TeacherCache(folder)


def build(
    teacher: LayerStack, blocks: Any, folder: Path | str, *, show: bool | None = None, **options
) -> TeacherCache:
    """Run `build_steps` to its end, with a bar."""
    return drive(build_steps(teacher, blocks, folder, **options), desc="teacher cache", show=show)
