"""Videos that tests make: smooth moving gradients, or noise, in any size, codec and pixel format."""

import io

import av
import numpy as np


def make_video(
    width, height, frames, codec="libvpx-vp9", pix_fmt="yuv420p", container="webm", options=None, noise=False, rate=12
):
    """A video of smooth moving gradients, or of noise, as bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        y, x = np.mgrid[0:height, 0:width]
        for t in range(frames):
            phases = x / width + t / 8, y / height + t / 11, (x + y) / (width + height) + t / 13
            picture = np.stack([127.5 + 120 * np.sin(2 * np.pi * phase) for phase in phases], -1)
            if noise:
                picture = np.random.default_rng(t).integers(0, 256, picture.shape)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    return buffer.getvalue()
