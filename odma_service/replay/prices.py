"""Prices: how long a decode step takes on a device with a model.

A step reads the weights and the KV of every request that decodes, computes a token of each,
and prefills the prompts that were admitted in it; copies come on top. Decoding takes as long
as the slower of memory and arithmetic, prefill as long as its arithmetic. Bandwidths are those
of the LPDDR emulation: long runs for weights and contiguous KV, a run for each page of paged
KV, half reads and half writes for copies.

Time is counted in whole picoseconds. So k steps at once take exactly as long as k steps one
by one, and a loop that skips steps can be compared with one that does not, digit by digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from odma_service.lpddr import COPY, LpddrDevice, bandwidth, read_device
from odma_service.pool.geometry import Device

PICOSECONDS = 10**12


@dataclass(frozen=True, slots=True)
class Serving:
    """A device and a model, as far as time is concerned.

    The defaults are a Cambricon MLU370-X4 and DeepSeek-R1-Distill-Qwen-7B in bf16. The compute
    efficiency and the pages in flight are assumptions, printed with every report. `device` is
    an LPDDR device by name or file, whose descriptor time is paid for copies only: kernels that
    follow a block table are taken to read pages without one, 16 at a time.
    """

    device: str | Path = "mlu370-x4"
    model: str = "DeepSeek-R1-Distill-Qwen-7B"
    peak_flops_per_second: float = 96e12
    compute_efficiency: float = 0.5
    weight_bytes: float = 15.2e9
    flops_per_token: float = 15.2e9
    attention_flops_per_pair: float = 4 * 28 * 3584  # a token with one earlier token
    kv_bytes_per_token: int = 57_344
    planes: int = 56
    pages_in_flight: int = 16
    swap_bytes_per_second: float = 0.0  # to the host's memory and back; 0: recompute instead

    @property
    def flops_per_second(self) -> float:
        """What the device reaches of its peak."""
        return self.peak_flops_per_second * self.compute_efficiency

    @property
    def lpddr(self) -> LpddrDevice:
        """The emulated memory."""
        return read_device(self.device)

    @property
    def sequential_bytes_per_second(self) -> float:
        """What reads of long runs reach."""
        return bandwidth(self.lpddr)

    def page_share(self, page_tokens: int) -> float:
        """Return what reads of pages reach of the sequential bandwidth."""
        run_bytes = page_tokens * self.kv_bytes_per_token // self.planes
        read = bandwidth(self.lpddr, run_bytes, self.pages_in_flight)
        return min(1.0, read / self.sequential_bytes_per_second)

    @property
    def copying(self) -> Device:
        """What copies are priced from, by the planner and in simulated time."""
        memory = self.lpddr
        peak = memory.peak_bytes_per_second
        return Device(
            str(self.device),
            memory.memory_bytes,
            peak,
            memory.descriptor_seconds,
            bandwidth(memory, write_fraction=COPY) / peak,
        )

    def prices(self, kv_bandwidth_share: float = 1.0) -> Prices:
        """Return the prices where KV is read at a share of the sequential bandwidth."""
        sequential, flops = self.sequential_bytes_per_second, self.flops_per_second
        kv_seconds = self.kv_bytes_per_token / sequential
        copying, swap = self.copying, self.swap_bytes_per_second
        return Prices(
            weights_ps=_ps(self.weight_bytes / sequential),
            kv_token_ps=_ps(kv_seconds / kv_bandwidth_share),
            token_ps=_ps(self.flops_per_token / flops),
            pair_ps=_ps(self.attention_flops_per_pair / flops),
            copy_ps=_ps(self.planes * copying.descriptor_seconds),
            copied_token_ps=_ps(copying.token_seconds(self.kv_bytes_per_token)),
            swapped_token_ps=_ps(self.kv_bytes_per_token / swap) if swap else 0,
        )


class Segment(NamedTuple):
    """Some decode steps in a row: their time, and the time integral of tokens written."""

    ps: int
    token_ps: int


class Prices(NamedTuple):
    """What things cost, in picoseconds. swapped_token_ps 0: preempted ones compute again."""

    weights_ps: int
    kv_token_ps: int
    token_ps: int
    pair_ps: int
    copy_ps: int
    copied_token_ps: int
    swapped_token_ps: int = 0

    def prefill_ps(self, tokens: int) -> int:
        """Return the time to prefill one prompt."""
        return tokens * self.token_ps + tokens * tokens // 2 * self.pair_ps

    def copies_ps(self, pieces: int, tokens: int) -> int:
        """Return the time of so many copies with so many tokens together."""
        return pieces * self.copy_ps + tokens * self.copied_token_ps

    def decode(self, running: int, written: int, steps: int, unread: int = 0) -> Segment:
        """Return `steps` steps of `running` requests with `written` tokens at the first.

        Memory reads `unread` tokens less than that.

        >>> Prices(100, 2, 1, 0, 0, 0).decode(running=3, written=10, steps=2)
        Segment(ps=246, token_ps=2838)
        """
        read_ps = self.kv_token_ps * (written - unread)
        memory = self.weights_ps + read_ps, self.kv_token_ps * running
        compute = self.token_ps * running + self.pair_ps * written, self.pair_ps * running
        lead, slope = memory[0] - compute[0], memory[1] - compute[1]
        last = lead + slope * (steps - 1)
        if lead >= 0 and last >= 0:
            return _integral(memory, running, written, steps)
        if lead <= 0 and last <= 0:
            return _integral(compute, running, written, steps)
        first, second = (memory, compute) if lead > 0 else (compute, memory)
        split = abs(lead) // abs(slope) + 1
        a = _integral(first, running, written, split)
        later = second[0] + second[1] * split, second[1]
        b = _integral(later, running, written + running * split, steps - split)
        return Segment(a.ps + b.ps, a.token_ps + b.token_ps)

    def steps_until(self, running: int, written: int, most: int, ps: int, unread: int = 0) -> int:
        """Return the fewest steps, at most `most`, that take at least `ps`."""
        if self.decode(running, written, most, unread).ps < ps:
            return most
        low, high = 1, most
        while low < high:
            middle = (low + high) // 2
            if self.decode(running, written, middle, unread).ps >= ps:
                high = middle
            else:
                low = middle + 1
        return low


def _integral(price: tuple[int, int], running: int, written: int, steps: int) -> Segment:
    """Return the sums over j < steps of price[0] + price[1] j, plain and times the tokens."""
    ones, sum_j = steps, steps * (steps - 1) // 2
    sum_jj = sum_j * (2 * steps - 1) // 3
    base, slope = price
    return Segment(
        base * ones + slope * sum_j,
        base * written * ones
        + (base * running + slope * written) * sum_j
        + slope * running * sum_jj,
    )


def _ps(seconds: float) -> int:
    return round(seconds * PICOSECONDS)
