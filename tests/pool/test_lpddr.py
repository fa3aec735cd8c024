"""LPDDR memory: what the models say, what they refuse, and how far they can be trusted."""

from __future__ import annotations

import json
import os
import random
from itertools import pairwise
from pathlib import Path

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

from lab.bench import lpddr_rows as rows
from odma_service.cli import app
from odma_service.errors import InvalidError
from odma_service.lpddr import (
    COPY,
    LpddrDevice,
    Traffic,
    bandwidth,
    layouts,
    read_device,
    read_grade,
)
from odma_service.lpddr.device import DATA
from odma_service.pool.geometry import PRESETS
from odma_service.rpc.v1 import emulator_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.rpc.v1.emulator_service_pb2_grpc import EmulatorServiceStub

MAPPINGS = ("row-bank[2]-col[5]-bg[2]-col[1]", "RoBaRaCoCh", "MOP4CLXOR")
PEAK = 12.8e9

# One row of each mechanism, as the cycle-level simulator has it.
REFERENCE = """\
simulator,config,mapping,pattern,chunk_bytes,write_fraction,requests,fraction_of_peak,row_hit_rate
ramulator2.1,lpddr5-6400_frfcfs_q32_refab_open,MOP4CLXOR,random_chunk,64,0.0,300000,0.43949,0.00008
ramulator2.1,lpddr5-6400_frfcfs_q32_refab_open,RoBaRaCoCh,random_chunk,1024,0.0,300000,0.7447,0.96670
ramulator2.1,lpddr5-6400_frfcfs_q16_refab_open,row-bank[2]-col[5]-bg[2]-col[1],random_chunk,64,0.0,200000,0.58621,0.49511
ramulator2.1,lpddr5-6400_frfcfs_q32_refpb_open,row-bank[2]-col[5]-bg[2]-col[1],random_chunk,1024,0.0,200000,0.88126,0.85203
ramulator2.1,lpddr5-6400_frfcfs_q32_refab_open,row-bank[2]-col[5]-bg[2]-col[1],random_chunk,64,0.2,300000,0.55168,0.44215
ramulator2.1,lpddr5-6400_frfcfs_q32_noref_open,row-bank[2]-col[5]-bg[2]-col[1],random_chunk,65536,0.0,200000,1.0,0.98436
dramsim3,lp5timing-on-gddr5x-engine_frfcfs_q32_refab_open,MOP4CLXOR,random_chunk,64,0.0,300000,0.4548,
"""
DEVICE_REFERENCE = """\
simulator,config,mapping,pattern,block_bytes,channel_interleave_bytes,window_blocks,descriptor_serial_ck,requests,fraction_of_peak
ramulator2.1,24x_lpddr5-6400_x16_frfcfs_q32_refab_open,row-bank[2]-col[5]-bg[2]-col[1],random_block,16384,256,1,0,250664,0.4167
ramulator2.1,24x_lpddr5-6400_x16_frfcfs_q32_refab_open,row-bank[2]-col[5]-bg[2]-col[1],random_block,16384,256,16,80,250664,0.5336
"""


@pytest.fixture(scope="module")
def grade():
    return read_grade()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    (folder / "one.csv").write_text(REFERENCE)
    (folder / "many.csv").write_text(DEVICE_REFERENCE)
    return [str(folder / "one.csv"), str(folder / "many.csv")]


def run(*arguments):
    return CliRunner().invoke(app, ["lpddr", *arguments])


def test_the_models_agree_with_the_cycle_level_simulator(files):
    scores = json.loads(run("validate", *files, "--json").stdout)
    assert scores["rows"] == 5
    assert scores["mean_abs_rel_error"] < 0.01
    assert scores["max_abs_rel_error"] < 0.02
    assert scores["activation_error"] < 0.02
    assert scores["rank_correlation"] > 0.97
    assert scores["requests_per_second"] > 0
    assert scores["device"]["rows"] == 2
    assert scores["device"]["max_abs_rel_error"] < 0.05
    assert scores["estimator"]["rows"] == 7
    assert scores["estimator"]["max_abs_rel_error"] < 0.15
    assert scores["other"]["rows"] == 1
    assert scores["other"]["second_simulator"]["rows"] == 1


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_two_addresses_never_share_a_place(grade, mapping):
    model = LpddrDevice(grade, mapping=mapping).model()
    draw = random.Random(1)
    addresses = {draw.randrange(2**30) // 32 * 32 for _ in range(2000)} | set(range(0, 2**17, 32))
    assert len({model.locate(address) for address in addresses}) == len(addresses)


def test_the_default_mapping_changes_the_bank_group_every_64_bytes(grade):
    model = LpddrDevice(grade).model()
    assert [model.locate(address)[0] for address in range(0, 320, 32)] == [
        *(0, 0, 1, 1, 2, 2, 3, 3, 0, 0)
    ]


def test_a_stream_without_refresh_reaches_the_peak(grade):
    model = LpddrDevice(grade).with_controller(refresh="none").model()
    played = model.play(Traffic(65536, 20_000, 1000, sequential=True))
    assert played.fraction_of_peak == 1
    assert played.refreshes_all == 0


def test_the_commands_add_up(grade):
    model = LpddrDevice(grade).model()
    played = model.play(Traffic(64, 50_000, 0, write_fraction=0.3))
    assert played.reads + played.writes == played.requests == 50_000
    assert played.activates <= played.requests - played.row_hits + 16
    closed = played.precharges + 16 * played.precharges_all
    assert played.activates - 16 <= closed <= played.activates + 16 * played.precharges_all
    assert played.refreshes_all == played.cycles // 3125


def test_the_same_traffic_gives_the_same_result(grade):
    model = LpddrDevice(grade, channels=4).model()
    traffic = Traffic(1024, 20_000, 1000, window=8, write_fraction=0.2)
    assert model.play(traffic) == model.play(traffic)


def test_runs_are_played_once_each(grade):
    model = LpddrDevice(grade, channels=3).model()
    runs = np.array([[0, 32], [31, 2], [2**20 + 5, 100_000]], np.uint64)
    played = model.play(Traffic(window=1), runs)
    assert played.requests == 1 + 2 + 3126


def test_a_lone_run_costs_what_the_model_says(grade):
    device = LpddrDevice(grade, channels=24)
    runs = np.array([[i << 24, 16384] for i in range(200)], np.uint64)
    price = device.estimator().price(runs, 1)
    played = device.model().play(Traffic(window=1), runs)
    assert price.seconds == pytest.approx(played.seconds, rel=0.1)
    assert price.requests == played.requests


def test_no_runs_cost_nothing(grade):
    price = LpddrDevice(grade).estimator().price(np.empty((0, 2), np.uint64))
    assert price == (0, 0, 0)


def test_descriptors_come_one_by_one(grade):
    estimator = LpddrDevice(grade, channels=24).estimator()
    runs = np.array([[0, 1024]] * 1000, np.uint64)
    assert estimator.price(runs, 64, 1e-6).seconds == pytest.approx(1e-3, rel=0.01)


def test_what_was_measured_wins(grade):
    measured = ((16384, 16, 100e9), (2**20, 16, 250e9))
    estimator = LpddrDevice(grade, channels=24, measured=measured).estimator()

    def bandwidth(length):
        runs = np.array([[0, length]] * 1000, np.uint64)
        return 1000 * length / estimator.price(runs, 16).seconds

    assert bandwidth(16384) == pytest.approx(100e9, rel=0.01)
    assert bandwidth(2**20) == pytest.approx(250e9, rel=0.05)
    assert 100e9 < bandwidth(2**17) < 260e9


def test_pages_cost_more_the_shorter_they_are():
    found = layouts.compare(read_device("mlu370-x4"), 4096, 1024, 56, 16)
    assert [layout.runs for layout in found] == [56, 896, 3584, 14336, 229376]
    speeds = [layout.bytes_per_second for layout in found]
    assert all(a > b * (1 - 1e-9) for a, b in pairwise(speeds))
    assert speeds[0] > 1.4 * speeds[3] > 5 * speeds[4]
    assert [layout.relative_energy for layout in found] == sorted(
        layout.relative_energy for layout in found
    )


def test_the_larger_card_is_twice_the_smaller():
    small, large = read_device("mlu370-x4"), read_device("mlu370-x8")
    assert (small.peak_bytes_per_second, small.memory_bytes) == (24 * PEAK, 24 * 2**30)
    assert (large.peak_bytes_per_second, large.memory_bytes) == (48 * PEAK, 48 * 2**30)


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("rcd = 15", "rdc = 15", "timing.rdc"),
        ("rcd = 15", "", "timing.rcd"),
        ("rcd = 15", "rcd = 0", "timing.rcd"),
        ("rcd = 15", "rcd = 15.5", "timing.rcd"),
        ("rcd = 15", "rcd = -1", "timing.rcd"),
        ("rcd = 15", "rcd = 99999999999", "timing.rcd"),
        ("rc = 49", "rc = 20", "timing.rc"),
        ("aad = 8", "aad = 40", "timing.aad"),
        ("refi = 3125", "refi = 200", "timing.refi"),
        ("bank_groups = 4", "bank_groups = 3", "organisation.bank_groups"),
        ("banks_per_group = 4", "banks_per_group = 32", "organisation.banks_per_group"),
        ("rows = 32768", "rows = 33000", "organisation.rows"),
        ("row_bytes = 2048", "row_bytes = 16", "organisation.row_bytes"),
        ('"frfcfs"', '"fcfs"', "controller.scheduler"),
        ('"all-bank"', '"sometimes"', "controller.refresh"),
        ("read_entries = 32", "read_entries = 0", "controller.read_entries"),
        ("write_low = 0.2", "write_low = 0.9", "controller.write_high"),
        ("[energy]", "[energie]", "energie"),
    ],
)
def test_a_bad_parameter_file_is_refused_by_name(tmp_path, old, new, field):
    text = (DATA / "lpddr5-6400.toml").read_text()
    assert old in text
    file = tmp_path / "grade.toml"
    # Comments go along with what they explain.
    file.write_text("\n".join(line.split("#")[0].replace(old, new, 1) for line in text.split("\n")))
    with pytest.raises(InvalidError) as caught:
        read_grade(file)
    assert caught.value.field.endswith(field)


BITS = {
    "column": [5, 6, 7, 8, 9, 10],
    "group": [11, 12],
    "bank": [13, 14],
    "row": list(range(15, 30)),
}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bank": [12, 14]}, "address bit 12 is in group already"),
        ({"bank": [13]}, "mapping.bank: 2 bits"),
        ({"bank": [13, 40]}, "address bits 5 to 29"),
        ({"column": [4, 6, 7, 8, 9, 10]}, "address bits 5 to 29"),
        ({"bank_xor": [11]}, "mapping.bank_xor"),
        ({"row_xor": [13]}, "mapping.row_xor"),
        ({"rank": [3]}, "mapping.rank"),
        ({"bank": ["a"]}, "mapping.bank"),
    ],
)
def test_a_bad_table_of_bits_is_refused_by_name(grade, changes, complaint):
    LpddrDevice(grade, mapping=BITS).model()
    with pytest.raises(InvalidError, match=complaint):
        LpddrDevice(grade, mapping=BITS | changes).model()


@pytest.mark.parametrize(
    "mapping",
    ["", "row", "row-bank[2]-col[6]-bg[3]", "row-bank-col-bg-rank", "row-row-bank-bg-col"],
)
def test_a_bad_name_of_a_mapping_is_refused(grade, mapping):
    with pytest.raises(InvalidError, match="mapping"):
        LpddrDevice(grade, mapping=mapping).model()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"chunk_bytes": 33}, "chunk_bytes"),
        ({"chunk_bytes": 2**31}, "chunk_bytes"),
        ({"requests": 0}, "requests"),
        ({"window": 5000}, "window"),
        ({"write_fraction": 2.0}, "write_fraction"),
        ({"write_fraction": float("nan")}, "write_fraction"),
    ],
)
def test_bad_traffic_is_refused_by_name(grade, fields, field):
    traffic = Traffic(64, 1000)._replace(**fields)
    with pytest.raises(InvalidError) as caught:
        LpddrDevice(grade).model().play(traffic)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        (1, "lpddr5-6400_fcfs_q32_refab_open", "config"),
        (1, "lpddr9_frfcfs_q32_refab_open", "grade"),
        (2, "upside-down", "mapping"),
        (3, "zigzag", "pattern"),
        (6, "many", "requests"),
    ],
)
def test_a_row_that_cannot_be_played_is_refused_by_name(tmp_path, column, value, complaint):
    header, line, *_ = REFERENCE.splitlines()
    cells = line.split(",")
    cells[column] = value
    file = tmp_path / "bad.csv"
    file.write_text(f"{header}\n{','.join(cells)}\n")
    with pytest.raises(InvalidError, match=complaint):
        list(rows.play(rows.read_rows(file), lambda: 0.0))


def test_layouts_are_shown_side_by_side():
    shown = run("estimate", "--tokens", "256", "--planes", "2")
    assert shown.exit_code == 0
    assert "contiguous" in shown.stdout
    found = json.loads(run("estimate", "--json").stdout)["layouts"]
    assert [layout["run_bytes"] for layout in found] == [2**22, 2**18, 2**16, 2**14, 2**10]


def test_a_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    assert run("estimate", "--plot", str(tmp_path / "plot.png")).exit_code == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def emulator(server):
    with grpc.insecure_channel(server.target) as channel:
        yield EmulatorServiceStub(channel)


def test_access_is_priced_over_the_wire(emulator):
    runs = [pb.Run(offset_bytes=i << 20, length_bytes=16384) for i in range(100)]
    read = emulator.EstimateAccess(pb.EstimateAccessRequest(runs=runs, window=16))
    copied = emulator.EstimateAccess(
        pb.EstimateAccessRequest(runs=runs, window=16, access=pb.ACCESS_COPY)
    )
    assert 0.4 * 24 * PEAK < read.bytes_per_second < 24 * PEAK
    assert copied.seconds > read.seconds
    assert copied.activations > read.activations


def test_a_given_bandwidth_scales_the_price(emulator):
    runs = [pb.Run(length_bytes=1 << 26)] * 4
    answers = [
        emulator.EstimateAccess(
            pb.EstimateAccessRequest(
                runs=runs, device=types.Device(bandwidth_bytes_per_second=bandwidth)
            )
        )
        for bandwidth in (24 * PEAK, 12 * PEAK)
    ]
    assert answers[1].seconds == pytest.approx(2 * answers[0].seconds, rel=0.01)


@pytest.mark.parametrize(
    "request_pb",
    [
        pb.EstimateAccessRequest(runs=[pb.Run()]),
        pb.EstimateAccessRequest(window=2000),
        pb.EstimateAccessRequest(device=types.Device(preset="abacus")),
        pb.EstimateAccessRequest(device=types.Device(descriptor_seconds=-1)),
        pb.EstimateAccessRequest(device=types.Device(bandwidth_bytes_per_second=0)),
    ],
    ids=["length", "window", "preset", "descriptor", "bandwidth"],
)
def test_a_senseless_question_is_refused(emulator, request_pb):
    with pytest.raises(grpc.RpcError) as caught:
        emulator.EstimateAccess(request_pb)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


REAL = Path(os.environ.get("ODMA_REFERENCE_DIR", "../shared/reference"))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no reference rows in {REAL}")
def test_every_reference_row_is_within_its_goal():
    reference = [
        row
        for name in ("lpddr5_one_channel.csv", "lpddr5_24_channels.csv")
        for row in rows.read_rows(REAL / name)
    ]
    scores = rows.score(list(rows.play(reference, lambda: 0.0)))
    assert scores["mean_abs_rel_error"] <= 0.04
    assert scores["max_abs_rel_error"] <= 0.10
    assert scores["rank_correlation"] >= 0.97
    assert scores["device"]["mean_abs_rel_error"] <= 0.05
    assert scores["device"]["max_abs_rel_error"] <= 0.12
    assert scores["estimator"]["max_abs_rel_error"] <= 0.15


@pytest.mark.parametrize("preset", PRESETS)
def test_the_planner_prices_copies_by_the_emulation(preset):
    device = read_device(preset)
    assert device.peak_bytes_per_second == pytest.approx(PRESETS[preset].bandwidth_bytes_per_second)
    reached = bandwidth(device, write_fraction=COPY) / device.peak_bytes_per_second
    assert PRESETS[preset].copy_efficiency == pytest.approx(reached, rel=0.02)
