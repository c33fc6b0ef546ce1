"""Generation speed of a student beside its teacher."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from ildlab.limits import fitting
from ildlab.model.generate import greedy
from ildlab.model.stack import LayerStack

WARM_UP = 2  # tokens of a first turn that does not count


def generation_speed(
    student: LayerStack, teacher: LayerStack | None, tokens: Tensor, *, new_tokens: int = 24, rounds: int = 3
) -> tuple[float, float | None]:
    """Tokens a second that each generates (None without a teacher), greedily and with the KV cache.

    The prompt is the first 16 tokens of `tokens` [N, T] (both fewer in a very short window). The two take turns, and the
    median of the rounds counts, so that a busy machine slows both.
    """
    prompt, new_tokens = fitting(student.model, tokens[:1, :16].long(), new_tokens)  # [1, 16]
    stacks = [stack for stack in (student, teacher) if stack is not None]
    times: list[list[float]] = [[] for _ in stacks]
    for turn in range(rounds + 1):
        for stack, taken in zip(stacks, times):
            start = time.perf_counter()
            greedy(stack.model, prompt, tokens=new_tokens if turn else min(WARM_UP, new_tokens), exactly=True)
            if stack.device.type == "cuda":
                torch.cuda.synchronize(stack.device)
            taken.append(time.perf_counter() - start)
    rates = [new_tokens / float(np.median(taken[1:])) for taken in times]
    return rates[0], rates[1] if teacher is not None else None
