"""A network computed by OpenVINO, which is faster than PyTorch on some processors.

`benchmarks/features.py` compares them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dino.files import UserError
from dino.models.backbone import Backbone
from dino.runtime import Precision
from dino.weights.export.graph import Graph, check_graph, onnx_model


def openvino_engine(
    backbone: Backbone, size: tuple[int, int], precision: Precision = "fp32"
) -> Callable[[Float[Tensor, "B C H W"]], Float[Tensor, "B D"]]:
    """The function `backbone(images)`, once its values in fp32 are those of the network.

    Args:
        backbone: the network, on any device; OpenVINO computes on the CPU.
        size: height and width of the images in pixels; the function takes no others.
        precision: bf16 is used where the processor has it.

    Raises:
        UserError: if the extra `openvino` is missing.
    """
    try:
        import openvino
    except ImportError:
        raise UserError(
            "--engine openvino needs OpenVINO: pip install 'dino-ssl[openvino]'"
        ) from None
    graph = Graph(backbone, size)
    # Through ONNX: OpenVINO's converter of PyTorch modules reports its use over the internet.
    model = openvino.Core().read_model(onnx_model(graph, {}), b"")

    def compiled(type_: str) -> Callable[[Tensor], list[np.ndarray]]:
        options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        options["INFERENCE_PRECISION_HINT"] = type_
        network = openvino.Core().compile_model(model, "CPU", options)
        return lambda images: [*network(images.numpy()).values()]

    in_fp32 = compiled("f32")
    check_graph(graph, in_fp32)
    run = in_fp32 if precision == "fp32" else compiled("bf16")
    return lambda images: torch.from_numpy(run(images.cpu())[0])
