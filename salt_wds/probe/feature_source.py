"""Where a probe gets features from: through the encoders each time, out of memory, or from the disk. It need not know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from salt_wds.config import Config
from salt_wds.models.frozen import FrozenEncoder
from salt_wds.probe import feature_store as feature_cache
from salt_wds.probe.features import Features, Part, Table, extract, keep_in_memory


class FeatureSource:
    """Features of parts of the data, by some encoders.

    Args:
        config: of the run, with the data settings of the probe.
        encoders: by name.
        ledger: where samples that fail are recorded.
        views: random views of each sample that are kept, where features are.
        memory: bytes that features of one part may take in memory.
        cache: folder to keep the features of all parts in, and to take them from.
    """

    def __init__(
        self, config: Config, encoders: Mapping[str, FrozenEncoder], ledger: Path, *, views: int, memory: float,
        cache: Path | None = None,
    ) -> None:  # fmt: skip
        self._config, self._encoders, self._ledger = config, encoders, ledger
        self._views, self._memory, self._cache = views, memory, cache

    def describe(self, part: Part) -> str:
        """A line for the start of a probe: what becomes of the features that it learns from."""
        size = f"{self._bytes(part) / 1e9:.2f} GB for {self._views} views of {part.catalog.num_samples:,} clips"
        if self._cache is not None:
            return f"features  kept in {self._cache}: {size} (fp16)"
        if self._kept(part):
            return f"features  kept in memory: {size} (fp16) of the {self._memory / 1e9:g} GB of data.memory_gb"
        return (
            f"features  made anew in every epoch: {size} (fp16) are more than data.memory_gb = {self._memory / 1e9:g}"
        )

    def once(self, part: Part) -> Iterator[Features]:
        """All clips of a part, in order where it has views."""
        if self._cache is None:
            yield from self._extract(part, self._encoders)
            return
        for table in self._cached(part).values():
            yield from table.in_order(self._config.data.batch_size)

    def epochs(self, part: Part, epochs: int, seed: int) -> Iterator[Features]:
        """A part with random views, epoch after epoch, in an order of its own each; the same for every encoder."""
        if self._cache is None and not self._kept(part):
            yield from self._extract(part, self._encoders, epochs)
            return
        for table in (self._cached(part) if self._cache is not None else self._in_memory(part)).values():
            yield from table.shuffled(self._config.data.batch_size, epochs, self._views, part.catalog.num_samples, seed)

    def _extract(self, part: Part, encoders: Mapping[str, FrozenEncoder], epochs: float = 1) -> Iterator[Features]:
        """`extract`, with a progress bar on a terminal."""
        clips = part.positions(epochs) * len(encoders)
        with tqdm(total=clips, desc=part.name, unit="clip", leave=False, disable=None) as bar:
            for features in extract(part, encoders, self._config, self._ledger, epochs):
                yield features
                bar.update(len(features.keys))

    def _bytes(self, part: Part) -> int:
        """Of a part's features, in fp16, of all encoders."""
        tokens = sum(encoder.config.num_tokens * encoder.width for encoder in self._encoders.values())
        return 2 * tokens * part.positions(self._views)

    def _kept(self, part: Part) -> bool:
        return self._bytes(part) <= self._memory

    def _in_memory(self, part: Part) -> dict[str, Table]:
        return keep_in_memory(self._extract(part, self._encoders, self._views))

    def _cached(self, part: Part) -> dict[str, Table]:
        """Tables of the part from the disk, after writing those that are not there."""
        assert self._cache is not None
        folders = {name: self._cache / e.file_name / part.name for name, e in self._encoders.items()}
        descriptions = {
            name: feature_cache.describe(encoder, part, self._config, self._views)
            for name, encoder in self._encoders.items()
        }

        def tables() -> dict[str, Table | None]:
            return {
                name: feature_cache.open_table(folder, descriptions[name], self._encoders[name].device)
                for name, folder in folders.items()
            }

        missing = {name: self._encoders[name] for name, table in tables().items() if table is None}
        if missing:
            clips = self._extract(part, missing, 1 if part.views else self._views)
            feature_cache.write_tables({name: folders[name] for name in missing}, descriptions, clips)
        return {name: table for name, table in tables().items() if table is not None}
