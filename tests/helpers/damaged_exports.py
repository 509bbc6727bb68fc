"""Exports that are damaged, or that an attacker made, and the errors that they give."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper


def other_graph(folder: Path, graph: onnx.GraphProto, **options: Any) -> None:
    """Replace the trunk and its hash, as an attacker would."""
    model = helper.make_model(graph, **options)
    content = model.SerializeToString()
    (folder / "trunk.onnx").write_bytes(content)
    with_settings(
        folder,
        lambda s: s["files"].update({"trunk.onnx": hashlib.sha256(content).hexdigest()}),
    )


def with_settings(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    settings = json.loads((folder / "export.json").read_text())
    change(settings)
    (folder / "export.json").write_text(json.dumps(settings))


def small_graph(operator: str, domain: str = "") -> onnx.GraphProto:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("a", "b")]
    node = helper.make_node(operator, ["a"], ["b"], domain=domain)
    return helper.make_graph([node], "graph", ports[:1], ports[1:])


def outside_graph(target: str) -> onnx.GraphProto:
    """A graph with a weight in another file."""
    graph = small_graph("Identity")
    weight = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL
    )
    weight.external_data.add(key="location", value=target)
    graph.initializer.append(weight)
    graph.node.append(helper.make_node("Add", ["b", "w"], ["c"]))
    return graph


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no settings": (lambda f: (f / "export.json").unlink(), "is not an export"),
    "no json": (lambda f: (f / "export.json").write_text("{"), "is not JSON"),
    "a graph is missing": (lambda f: (f / "block.onnx").unlink(), "block.onnx"),
    "truncated": (
        lambda f: (f / "block.onnx").write_bytes((f / "block.onnx").read_bytes()[:1000]),
        "differs from the hash",
    ),
    "other format": (lambda f: with_settings(f, lambda s: s.update(format=7)), "has the format 7"),
    "unknown entry": (
        lambda f: with_settings(f, lambda s: s.update(run="x")),
        "the unknown entry 'run'",
    ),
    "missing entry": (lambda f: with_settings(f, lambda s: s.pop("version")), "entry is missing"),
    "part is no object": (
        lambda f: with_settings(f, lambda s: s.update(cache=[])),
        "cache is .*; it must be an object",
    ),
    "wrong type": (
        lambda f: with_settings(f, lambda s: s["cache"].update(layers="4")),
        "cache.layers is '4'",
    ),
    "ranges": (
        lambda f: with_settings(f, lambda s: s["tokens"].update(low=[1.0] * 7)),
        "low below high",
    ),
    "checks": (
        lambda f: with_settings(f, lambda s: s["checks"][0]["tokens"].pop()),
        "there must be 56 of them",
    ),
    "checks of other tokens": (
        lambda f: with_settings(f, lambda s: s["checks"][0].update(tokens=[7] * 56)),
        "gives other tokens on this machine",
    ),
    "checks without a list": (
        lambda f: with_settings(f, lambda s: s.update(checks={"seed": 0})),
        "it must be a list of objects",
    ),
    "camera sizes": (
        lambda f: with_settings(f, lambda s: s["images"].update(sizes=[[96, 0], [96, 96]])),
        "each must have an entry for each of 2 cameras",
    ),
    "two cameras of one name": (
        lambda f: with_settings(f, lambda s: s["images"].update(cameras=["a", "a"])),
        "the names must differ",
    ),
    "stems": (
        lambda f: with_settings(f, lambda s: s["images"].update(stems=[0, 2])),
        "the numbers count from 0",
    ),
    "colours": (
        lambda f: with_settings(f, lambda s: s["images"].update(mean=[0.0])),
        "must have three values each",
    ),
    "template": (
        lambda f: with_settings(f, lambda s: s["text"].update(template="do {x}")),
        "text.template is 'do {x}'",
    ),
    "other family": (
        lambda f: with_settings(f, lambda s: s.update(family="llama")),
        "the cache must have a position for each",
    ),
    "text without words": (
        lambda f: with_settings(f, lambda s: s["text"].update(vocabulary=[])),
        "text.vocabulary has 0 words",
    ),
    "images of another kind": (
        lambda f: with_settings(f, lambda s: s["images"].update(kind="declared")),
        "family is compact with declared images",
    ),
    "resizes of square images": (
        lambda f: with_settings(f, lambda s: s["images"].update(resizes=[[], []])),
        "only bytes have resizes",
    ),
    "too many cameras": (
        lambda f: with_settings(f, lambda s: s["images"].update(cameras=list(map(str, range(99))))),
        "99 entries; at most 64",
    ),
    "sides": (
        lambda f: with_settings(f, lambda s: s["images"].update(sizes=[[96, 96], [96, 8193]])),
        "in .1, 8192.",
    ),
    "increments": (
        lambda f: with_settings(f, lambda s: s.update(delta_dims=[7])),
        "must be dimensions in .0, 6.",
    ),
    "statistics": (
        lambda f: with_settings(f, lambda s: s["state"].update(std=[1.0])),
        "state.std 1; it must be none or 14",
    ),
    "a state that is divided by 0": (
        lambda f: with_settings(f, lambda s: s["state"].update(std=[0.0] * 14, eps=0.0)),
        "their sum divides the state",
    ),
    "too large": (
        lambda f: with_settings(
            f, lambda s: s["tokens"].update(low=[-1.0] * 9999, high=[1.0] * 9999)
        ),
        "is too large",
    ),
    "steps": (
        lambda f: with_settings(f, lambda s: s.update(n_action_steps=9)),
        r"n_action_steps is 9; it must be in \[1, 8\]",
    ),
    "files": (
        lambda f: with_settings(f, lambda s: s["files"].update({"../x": "0"})),
        "it must have stem_0.onnx",
    ),
    "decoding": (
        lambda f: with_settings(f, lambda s: s["decoding"].update(method="beam")),
        "decoding.method is 'beam'",
    ),
    "words": (
        lambda f: with_settings(f, lambda s: s["text"]["vocabulary"].reverse()),
        "it must list distinct lower-case words, sorted",
    ),
    "other sizes": (
        lambda f: with_settings(f, lambda s: s["cache"].update(layers=3)),
        "other inputs or outputs",
    ),
    "other graph": (lambda f: other_graph(f, small_graph("Identity")), "other inputs or outputs"),
    "no graph": (
        lambda f: (
            (f / "trunk.onnx").write_bytes(b"x"),
            with_settings(
                f,
                lambda s: s["files"].update({"trunk.onnx": hashlib.sha256(b"x").hexdigest()}),
            ),
        ),
        "cannot be loaded",
    ),
    "custom operator": (
        lambda f: other_graph(
            f,
            small_graph("Run", "somebody"),
            opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("somebody", 1)],
        ),
        "cannot be loaded",
    ),
    "later opset": (
        lambda f: other_graph(
            f, small_graph("Identity"), opset_imports=[helper.make_opsetid("", 999)]
        ),
        "cannot be loaded",
    ),
    "weights of another file": (
        lambda f: other_graph(f, outside_graph(str(Path(__file__)))),
        "cannot be loaded",
    ),
    "weights outside the folder": (
        lambda f: other_graph(f, outside_graph("../secret")),
        "cannot be loaded",
    ),
}
