# SPDX-License-Identifier: Apache-2.0
"""What the processes of one launch do together."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor


Encode = Callable[..., Any]
Evaluator = Callable[[Encode], dict[str, float]]

_BATCH = 32  # texts of one call while an evaluator runs
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # what a launcher of several processes sets
_DOORS = {"ACCELERATE_USE_FSDP": DistributedType.FSDP, "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED}


def process_state() -> PartialState:
    """Return which process of how many this is; with gloo where there is no accelerator.

    Raises:
        RuntimeError: If the launch was asked for more than it does. Accelerate 1.15 runs one process for `--cpu
            --num_processes 2` and for distributed_type MULTI_CPU: the batch would be a part of what was asked for.
    """
    # Without cpu=True Accelerate takes every process of a launch on a CPU for the only one, and all would write.
    state = PartialState(cpu=not torch.accelerator.is_available())
    # For several processes on a CPU `accelerate launch` sets the meeting place, but starts nobody else to meet.
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if launched and state.num_processes == 1 and not any(name in os.environ for name in _RANKS):
        raise RuntimeError(
            "hf_distill: `accelerate launch` was asked for several processes, but runs this one alone (it does so for --cpu "
            "and for distributed_type MULTI_CPU), expected as many as asked for. The batch, and the learning rate's schedule, "
            "would be another. Use `--config_file recipes/accelerate/two_processes_cpu.yaml`, or `torchrun --nproc_per_node 2`."
        )
    return state


def require_strategy(state: Any) -> None:
    """Check that training is distributed as the launch said.

    Args:
        state: An `AcceleratorState` or what has its distributed_type.

    Raises:
        RuntimeError: If FSDP or DeepSpeed was asked for and is not what runs (on a CPU Accelerate 1.15 falls back to DDP):
            a model that was to be sharded would lie whole on every device.
    """
    for name, wanted in _DOORS.items():
        if os.environ.get(name, "").lower() in ("1", "true") and state.distributed_type != wanted:
            raise RuntimeError(
                f"hf_distill: the launch asks for {wanted.value}, but what runs is {state.distributed_type.value}, expected "
                "the same. Every device would hold the whole model. Run it on GPUs, or leave that out of the config."
            )


def require_same(facts: Mapping[str, Any]) -> None:
    """Check that every process knows the same facts; each calls it.

    Raises:
        ValueError: If they differ, in which process and what: each would train toward something else, and the mean of their
            gradients toward nothing.
    """
    if process_state().num_processes == 1:
        return
    mine = {key: json.dumps(value, sort_keys=True, default=str) for key, value in facts.items()}
    everyone = gather_object([mine])
    for rank, other in enumerate(everyone):
        for key, value in everyone[0].items():
            if other.get(key) != value:
                raise ValueError(
                    f"hf_distill: process {rank} has another {key} than process 0 ({_short(other.get(key))} there, "
                    f"{_short(value)} here), expected the same. Their gradients would be averaged toward nothing. Give every "
                    "process the same data, cache and settings; seed what is drawn at random."
                )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:40]}… (sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def gather_rows(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of all processes' rows, [W * B, ...] from [B, ...] of each, in order of rank; every process calls it.

    The gradient reaches a process's own rows only, times the number of processes W: each computes the same loss of the whole
    batch, and the mean of their gradients (DDP, FSDP, ZeRO) is then the gradient of that loss.
    """
    state = process_state()
    if state.num_processes == 1:
        return dict(values)
    found = {}
    for name, value in values.items():
        own = value.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(state.num_processes)]
        torch.distributed.all_gather(parts, own)
        if value.requires_grad:
            parts[state.process_index] = own + (value - own) * state.num_processes
        found[name] = torch.cat(parts)
    return found


def score(evaluators: Sequence[Evaluator], encode: Encode) -> dict[str, float]:
    """Run each evaluator once; the processes share the encoding, and each returns the scores.

    The evaluators run on the main process. When one asks for embeddings, the others are told the texts, and every process
    encodes its part, each as often as the others: a sharded model (FSDP, ZeRO-3) computes only when all of them call it.

    Args:
        evaluators: Callables that take `encode(texts) -> [N, D]` and return named scores.
        encode: texts -> [N, D] numpy; on every process the same.

    Raises:
        RuntimeError: On the other processes, if an evaluator fails on the main one.
    """
    state = process_state()
    if state.num_processes == 1:
        return {name: value for evaluator in evaluators for name, value in evaluator(encode).items()}
    if not state.is_main_process:
        while True:
            [(kind, content)] = broadcast_object_list([None])
            if kind == "scores":
                return content
            if kind == "failed":
                raise RuntimeError(f"hf_distill: an evaluator failed on the main process: {content}")
            _encode_together(encode, *content)

    def together(texts: list[str], **options: Any) -> np.ndarray:
        if not len(texts):
            return np.asarray(encode([], **options))
        work = (list(texts), options)
        broadcast_object_list([("encode", work)])
        return _encode_together(encode, *work)

    try:
        scores = {name: value for evaluator in evaluators for name, value in evaluator(together).items()}
    except Exception as error:
        broadcast_object_list([("failed", repr(error))])
        raise
    broadcast_object_list([("scores", scores)])
    return scores


def _encode_together(encode: Encode, texts: list[str], options: Mapping[str, Any]) -> np.ndarray:
    """Return [N, D]: batches of similar length, dealt out in turn."""
    state = process_state()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    batches = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]
    found = []
    for turn in range(math.ceil(len(batches) / state.num_processes)):
        number = turn * state.num_processes + state.process_index
        batch = batches[number % len(batches)]  # whoever has none left keeps the others company
        vectors = np.asarray(encode([texts[i] for i in batch], **options))
        if number < len(batches):
            found.append((batch, vectors))
    found = gather_object(found)
    result = np.empty((len(texts), found[0][1].shape[1]), found[0][1].dtype)
    for batch, vectors in found:
        result[batch] = vectors
    return result
