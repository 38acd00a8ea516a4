"""Triton's NAME_preprocess_dali model: encoded pictures -> uint8 pixels, JPEG files decoded by the GPU.

Export copies this file as its dali.py, with the contract as preprocess.json beside it; DALI's backend serialises the pipeline
when it loads the model. As serve/preprocess.py does, as far as DALI can: docs/serving.md says what differs.
"""

import json
from pathlib import Path
from typing import Any

from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.plugin.triton import autoserialize

_PREPROCESS: dict[str, Any] = json.loads(Path(__file__).with_name("preprocess.json").read_text(encoding="utf-8"))


@autoserialize  # type: ignore[untyped-decorator]
@pipeline_def(batch_size=32, num_threads=4, device_id=0)  # type: ignore[untyped-decorator]  # Triton's configuration goes before
def prepare(decoder: str = "mixed") -> Any:  # noqa: ANN401  # a DALI data node, as are all below
    """Bytes (N,) -> RGB (height_px, width_px, 3), upright."""
    encoded = fn.external_source(device="cpu", name="bytes", ndim=1, dtype=types.UINT8)
    # The `experimental` names alone turn pictures upright in DALI 1; DALI 2 has them still.
    image = fn.experimental.decoders.image(encoded, device=decoder, adjust_orientation=True, jpeg_fancy_upsampling=True)
    return fn.resize(
        image,
        size=(_PREPROCESS["height_px"], _PREPROCESS["width_px"]),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
        **_region(encoded),
    )


def _region(encoded: Any) -> dict[str, Any]:  # noqa: ANN401
    """The part of the picture that fills the frame, in pixels: all of it for `stretch`."""
    if _PREPROCESS["resize"] == "stretch":
        return {}
    shape = fn.experimental.peek_image_shape(encoded, adjust_orientation=True, dtype=types.FLOAT)
    left, top, right, bottom = crop_box(shape[1], shape[0])
    return {"roi_start": fn.stack(top, left), "roi_end": fn.stack(bottom, right)}


def crop_box(width: Any, height: Any) -> tuple[Any, Any, Any, Any]:  # noqa: ANN401
    """`serve.preprocess.crop_box` in DALI's arithmetic."""
    aspect = _PREPROCESS["height_px"] / _PREPROCESS["width_px"]
    box_height = _PREPROCESS["crop"] * math.min(height, width * aspect)
    box_width = box_height / aspect
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height
