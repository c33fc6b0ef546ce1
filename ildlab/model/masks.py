"""Keep transformers from waiting for the device at every forward pass.

Without an attention mask transformers (>= 4.53) looks into the position ids for several sequences packed in
one row, and reads the answer back: the host waits for the device at every call. Position ids that the
model makes itself never are packed, so that the answer is known.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_OWN = threading.local()
_INSTALL = threading.Lock()


def _install() -> None:
    """Wrap the look-up once; outside of `unpacked` it does what it always did."""
    from transformers import masking_utils

    with _INSTALL:
        look = getattr(masking_utils, "find_packed_sequence_indices", None)
        if look is None or hasattr(look, "ildlab"):
            return

        def find_packed_sequence_indices(position_ids):
            return None if getattr(_OWN, "depth", 0) else look(position_ids)

        find_packed_sequence_indices.ildlab = True
        masking_utils.find_packed_sequence_indices = find_packed_sequence_indices


@contextlib.contextmanager
def unpacked() -> Iterator[None]:
    """Promise, for this thread, that no row holds several packed sequences."""
    _install()
    _OWN.depth = getattr(_OWN, "depth", 0) + 1
    try:
        yield
    finally:
        _OWN.depth -= 1
