"""The network as an ONNX graph: `own` and `trusted` of network.py once more, node by node.

Weights of the large layers are int8 with a scale for each column. They are cast, not
"dequantised": onnxruntime makes floats of them once, when it loads the graph. For the operator
of that name it would quantise the inputs too, and what is answered would be off by a per cent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from odma_service._native.features import GROUPS, STATS
from odma_service.errors import InvalidError
from odma_service.learning.predictor import HISTORY_FIELDS, WINDOW
from predictor_onnx.network import CLIP, DIMS, LEAST_SPREAD, Scale

OPSET, IR_VERSION = 18, 10
LARGE = ("w0", "w1", "w2")
STEPS = "_steps"
UNNAMED = re.compile("c[0-9]+")
PARTS = (GROUPS * DIMS, GROUPS, STATS, 1, HISTORY_FIELDS)

Arrays = Mapping[str, NDArray[np.float32]]


def quantised(weights: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return a matrix as int8, and for each column what 1 stands for."""
    scales = np.maximum(np.abs(weights).max(0), 1e-9) / 127
    return np.rint(weights / scales).astype(np.int8), scales.astype(np.float32)


class Graph:
    """Nodes in order; a name stands for what a node gives."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, values: Any, kind: Any = np.float32, name: str = "") -> str:
        """Keep an array and return its name. What was trained has a name that it is read by."""
        name = name or f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, kind), name))
        return name

    def add(self, kind: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node and return what it gives; an input that is no name is a constant."""
        names = [given if isinstance(given, str) else self.constant(given) for given in inputs]
        given = [f"n{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, names, given, **attributes))
        return given[0] if outputs == 1 else given

    def columns(self, of: str, start: int, end: int) -> str:
        """Return some columns of rows."""
        bounds = (self.constant([bound], np.int64) for bound in (start, end, 1))
        return str(self.add("Slice", of, *bounds))

    def mean(self, of: str) -> str:
        """Return the mean of each row."""
        return str(self.add("ReduceMean", of, self.constant([1], np.int64), keepdims=1))

    def join(self, *parts: str) -> str:
        """Return rows side by side."""
        return str(self.add("Concat", *parts, axis=1))

    def layer(self, of: str, weights: Arrays, name: str) -> str:
        """Return a dense layer."""
        bias = self.constant(weights[f"{name}_bias"], name=f"{name}_bias")
        if name in LARGE:
            whole, steps = quantised(weights[name])
            whole_name = self.constant(whole, np.int8, name)
            matrix = self.add("Cast", whole_name, to=TensorProto.FLOAT)
            matrix = self.add("Mul", matrix, self.constant(steps, name=f"{name}{STEPS}"))
        else:
            matrix = self.constant(weights[name], name=name)
        return str(self.add("Add", self.add("MatMul", of, matrix), bias))


def build(weights: Arrays, scale: Scale) -> bytes:
    """Return the network as a model: inputs [n, width] to quantiles [n, 7] of log lengths."""
    g = Graph()
    names: Any = [g.constant(np.atleast_1d(v), name=k) for k, v in scale._asdict().items()]
    fixed = Scale(*names)
    sizes = g.constant(PARTS, np.int64)
    pooled, known, stats, text, history = g.add("Split", "inputs", sizes, outputs=5, axis=1)
    count = g.columns(history, 9, 10)
    is_told = g.add("Greater", count, [0.0])
    told = g.add("Cast", is_told, to=TensorProto.FLOAT)
    mean = g.add("Where", is_told, g.columns(history, 0, 1), fixed.wide_mean)
    at_least = g.add("Max", g.columns(history, 1, 2), [LEAST_SPREAD])
    spread = g.add("Where", is_told, at_least, fixed.wide_sd)
    window = g.add("Where", is_told, g.columns(history, 2, 9), fixed.wide)
    standard = g.add("Div", g.add("Sub", stats, fixed.stats_mean), fixed.stats_sd)
    standard = g.add("Clip", standard, np.float32(-CLIP), np.float32(CLIP))
    tokens = g.columns(standard, 0, 1)
    experience = g.add("Div", g.add("Log", g.add("Add", count, [1.0])), [np.log1p(WINDOW)])
    level = g.add("Mul", g.add("Sub", mean, fixed.wide_mean), told)
    log_spread = g.add("Mul", g.add("Log", spread), told)
    shape = g.add("Mul", g.add("Div", g.add("Sub", window, mean), spread), told)
    of_text = g.add("Mul", g.columns(standard, 1, STATS), text)
    words = g.add("Mul", _normalised(g, pooled, weights), text)
    past = (log_spread, shape, experience, told)
    hidden = g.join(words, known, tokens, of_text, text, level, *past)
    for name in ("w0", "w1"):
        hidden = g.add("Relu", g.layer(hidden, weights, name))
    out = g.layer(hidden, weights, "w2")
    middle = g.add("Add", mean, g.add("Mul", g.columns(out, 2, 3), spread))
    gaps = g.add("Mul", g.add("Softplus", out), spread)
    gaps = g.join(g.columns(gaps, 0, 2), g.columns(gaps, 3, 7))
    said = _around(g, middle, gaps)
    moved = g.add("Div", g.add("Sub", middle, g.columns(window, 2, 3)), spread)
    moved = g.add("Clip", moved, np.float32(-4), np.float32(4))
    signs = g.join(
        known,
        g.add("Mul", _norms(g, pooled), text),
        *(moved, g.add("Abs", moved), _ratio(g, said, window, spread)),
        *(experience, told, log_spread, text, tokens),
    )
    doubt = _doubts(g, signs, weights, "trust")
    share = g.add("Sigmoid", g.add("Add", g.columns(doubt, 0, 1), [2.0]))
    wider = g.add("Exp", g.add("Tanh", g.columns(doubt, 1, 3)))
    below, above = g.columns(wider, 0, 1), g.columns(wider, 1, 2)
    factors = g.join(below, below, above, above, above, above)
    wide = _around(g, middle, g.add("Mul", gaps, factors))
    usual = _mended(g, window, spread, _doubts(g, g.join(*past), weights, "past"))
    rest = g.add("Mul", g.add("Sub", [1.0], share), usual)
    g.add("Max", g.add("Add", g.add("Mul", share, wide), rest), [0.0])
    return _model(g)


def trained_in(model: bytes) -> tuple[dict[str, NDArray[np.float32]], Scale]:
    """Return the weights and the scale that a model was built of, as they are stored.

    Raises InvalidError for a model without their names.
    """
    constants = {
        each.name: numpy_helper.to_array(each)
        for each in onnx.load_from_string(model).graph.initializer
    }
    try:
        wide = [constants.pop(name) for name in Scale._fields]
        for name in LARGE:
            constants[name] = constants[name] * constants.pop(f"{name}{STEPS}")
    except KeyError as missing:
        raise InvalidError(
            "model", f"model.onnx does not name what was trained: {missing}"
        ) from None
    scale = Scale(wide[0], wide[1], wide[2], float(wide[3][0]), float(wide[4][0]))
    return {
        name: each for name, each in constants.items() if UNNAMED.fullmatch(name) is None
    }, scale


def _normalised(g: Graph, pooled: str, weights: Arrays) -> Any:
    centred = g.add("Sub", pooled, g.mean(pooled))
    variance = g.mean(g.add("Mul", centred, centred))
    unit = g.add("Div", centred, g.add("Sqrt", g.add("Add", variance, [1e-5])))
    scale, shift = (g.constant(weights[name], name=name) for name in ("norm_scale", "norm_shift"))
    return g.add("Add", g.add("Mul", unit, scale), shift)


def _norms(g: Graph, pooled: str) -> Any:
    squares = g.add("Mul", pooled, pooled)
    groups = (g.columns(squares, DIMS * i, DIMS * (i + 1)) for i in range(GROUPS))
    means = g.join(*(g.mean(group) for group in groups))
    return g.add("Log", g.add("Sqrt", g.add("Add", means, [1e-4])))


def _ratio(g: Graph, said: str, window: str, spread: str) -> Any:
    own, usual = (g.add("Sub", g.columns(of, 4, 5), g.columns(of, 0, 1)) for of in (said, window))
    usual = g.add("Add", usual, g.add("Mul", spread, [0.1]))
    return g.add("Log", g.add("Add", g.add("Div", own, usual), [0.05]))


def _mended(g: Graph, window: str, spread: str, doubt: str) -> str:
    gaps = g.add("Sub", g.columns(window, 1, 7), g.columns(window, 0, 6))
    gaps = g.add("Mul", gaps, g.add("Exp", g.add("Tanh", g.columns(doubt, 1, 7))))
    more = g.add("Softplus", g.add("Sub", g.columns(doubt, 7, 13), [4.0]))
    gaps = g.add("Add", gaps, g.add("Mul", more, spread))
    moved = g.add("Mul", g.add("Mul", g.add("Tanh", g.columns(doubt, 0, 1)), [0.5]), spread)
    return _around(g, g.add("Add", g.columns(window, 2, 3), moved), gaps)


def _doubts(g: Graph, of: str, weights: Arrays, name: str) -> str:
    hidden = g.add("Relu", g.layer(of, weights, f"{name}0"))
    return g.layer(hidden, weights, f"{name}1")


def _around(g: Graph, middle: str, gaps: str) -> str:
    """Return quantiles from a median and the six gaps between them."""
    quarter = g.add("Sub", middle, g.columns(gaps, 1, 2))
    tenth = g.add("Sub", quarter, g.columns(gaps, 0, 1))
    up = g.add("CumSum", g.columns(gaps, 2, 6), g.constant(1, np.int64))
    return g.join(tenth, quarter, middle, g.add("Add", middle, up))


def _model(g: Graph) -> bytes:
    g.nodes[-1].output[0] = "quantiles"
    ports = (("inputs", sum(PARTS)), ("quantiles", 7))
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])]
        for name, width in ports
    )
    graph = helper.make_graph(g.nodes, "lengths", inputs, outputs, g.constants)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
