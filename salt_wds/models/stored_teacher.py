"""A teacher's tokens as they are stored: rounded to fewer bits, with or without a PCA, and back; and whose they are.

Tokens of a ViT have channels that are far larger than the others, so every channel has its own centre and step. They
come from the tokens of some clips (`calibrate`); what lies beyond the range of those is cut off.

Shapes: D width of a token, C numbers stored of it, M tokens.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from salt_wds.models.teacher import Teacher
from shard_tools.format.latents import Latents

_PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_PCA = re.compile(r"pca-([1-9][0-9]{0,3})-int8")
STORES = (*_PLAIN, "int8", "fp8", "pca-N-int8")


def is_store(text: str) -> bool:
    """Whether this is the name of a store, such as "pca-256-int8"."""
    return text in STORES[:-1] or _PCA.fullmatch(text) is not None


class Quantiser(nn.Module):
    """`encode` makes what is stored of targets (..., D); calling it gives targets in fp32 back.

    Attributes: `store`; `dtype` and `channels` (C) of what is stored; `parameters_by_name`, fp32, empty for plain
    stores: `centre` and `scale` (C,), for a PCA also `mean` (D,) and the orthonormal `basis` (D, C).
    """

    def __init__(self, store: str, width: int, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        pca = _PCA.fullmatch(store)
        self.store, self.width = store, width
        self.dtype = _PLAIN.get(store, torch.float8_e4m3fn if store == "fp8" else torch.int8)
        self.channels = int(pca[1]) if pca else width
        self.parameters_by_name = dict(parameters)
        for name, tensor in parameters.items():
            shape = {"mean": (width,), "basis": (width, self.channels)}.get(name, (self.channels,))
            self.register_buffer(name, tensor.reshape(shape).clone(), persistent=False)

    def encode(self, targets: Tensor) -> Tensor:
        """What is stored of targets (..., D): (..., C) of `dtype`."""
        if self.store in _PLAIN:
            return targets.to(self.dtype)
        values = targets.float()
        if "basis" in self.parameters_by_name:
            values = (values - self.get_buffer("mean")) @ self.get_buffer("basis")
        largest = _LARGEST[self.dtype]
        codes = ((values - self.get_buffer("centre")) / self.get_buffer("scale")).clamp(-largest, largest)
        return (codes.round() if self.dtype == torch.int8 else codes).to(self.dtype)

    def forward(self, stored: Tensor) -> Tensor:
        values = stored.float()
        if self.store in _PLAIN:
            return values
        values = values * self.get_buffer("scale") + self.get_buffer("centre")
        if "basis" in self.parameters_by_name:
            values = values @ self.get_buffer("basis").T + self.get_buffer("mean")
        return values

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves to a device with its model, and stays in fp32 whatever that is cast to."""
        return super()._apply(lambda tensor: fn(tensor).float(), recurse)


def calibrate(store: str, tokens_MD: Tensor) -> Quantiser:  # noqa: N803
    """The quantiser for tokens like these (M, D), fp32; on their device."""
    width, parameters = tokens_MD.shape[1], dict[str, Tensor]()
    values = tokens_MD.double()
    if pca := _PCA.fullmatch(store):
        mean = values.mean(dim=0)
        vectors = torch.linalg.eigh((values - mean).T @ (values - mean)).eigenvectors  # ascending
        basis = vectors.flip(1)[:, : int(pca[1])]
        values = (values - mean) @ basis
        parameters = {"mean": mean, "basis": basis}
    if store not in _PLAIN:
        low, high = values.amin(dim=0), values.amax(dim=0)
        largest = _LARGEST[torch.float8_e4m3fn if store == "fp8" else torch.int8]
        parameters["centre"] = (low + high) / 2
        parameters["scale"] = ((high - low) / 2 / largest).clamp_min(torch.finfo(torch.float32).tiny)
    return Quantiser(store, width, {name: tensor.float() for name, tensor in parameters.items()})


def to_text(quantiser: Quantiser) -> dict[str, str]:
    """The parameters for dataset.json: float32 in base64."""
    arrays = {name: tensor.cpu().contiguous().numpy() for name, tensor in quantiser.parameters_by_name.items()}
    return {name: base64.b64encode(array.astype("<f4").tobytes()).decode() for name, array in arrays.items()}


def from_text(store: str, width: int, parameters: Mapping[str, str]) -> Quantiser:
    """The quantiser with parameters of dataset.json, on the CPU."""
    arrays = {name: np.frombuffer(base64.b64decode(text), "<f4").copy() for name, text in parameters.items()}
    return Quantiser(store, width, {name: torch.from_numpy(array) for name, array in arrays.items()})


def stored_quantiser(latents: Latents) -> Quantiser:
    """The quantiser of stored latents, on the CPU."""
    return from_text(latents.store, latents.width, latents.parameters)


def teacher_hash(teacher: Teacher) -> str:
    """XXH3-128 over the weights in fp32, whatever their names, and what else of the architecture changes tokens."""
    tensors = [*teacher.network.parameters(), *teacher.network.buffers()]
    parts = sorted(
        f"{tuple(tensor.shape)} {xxhash.xxh3_128_hexdigest(tensor.detach().float().contiguous().cpu().numpy().data)}"
        for tensor in tensors
    )
    eps = sorted({module.eps for module in teacher.network.modules() if isinstance(module, nn.LayerNorm)})
    return xxhash.xxh3_128_hexdigest(repr([parts, teacher.heads, len(teacher.blocks), eps]).encode())


class SquaredErrors:
    """Sums that give R2 of stored against exact tokens: 1 - MSE / variance about the mean of each channel."""

    def __init__(self, width: int) -> None:
        self.count, self.error = 0, 0.0
        self._sums = torch.zeros(2, width, dtype=torch.float64)

    def add(self, exact_MD: Tensor, stored_MD: Tensor) -> None:  # noqa: N803
        """Add tokens (M, D)."""
        exact = exact_MD.double()
        self.count += len(exact)
        self.error += (exact - stored_MD.double()).square().sum().item()
        self._sums += torch.stack([exact.sum(dim=0), exact.square().sum(dim=0)]).cpu()

    def squares(self) -> tuple[float, float]:
        """The summed squares of errors, and of deviations of the exact tokens from the mean of their channel."""
        total, squares = self._sums
        return self.error, max((squares - total.square() / max(self.count, 1)).sum().item(), 0.0)


def r2(error: float, deviation: float) -> float:
    """R2 from summed squares; that of a constant is 1 if it is stored exactly."""
    return 1.0 if not error else 1 - error / max(deviation, torch.finfo(torch.float64).tiny)
