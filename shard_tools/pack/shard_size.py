"""How large shards are, where nobody says."""

from __future__ import annotations

MIB = 1 << 20
_AUTO_LARGEST = 256 * MIB
_AUTO_SMALLEST = 16 * MIB
_AUTO_SHARDS = 256


def auto_shard_bytes(total: int) -> int:
    """Shard size for a data set of `total` bytes: the largest of 16, 32, 64, 128 and 256 MiB that gives 256 shards.

    Even work: shards are what packing, checking and other readers share out, and N of them on W workers take at most
    W/N longer than a perfect split, an eighth for 32 workers and 256 shards. Large sequential reads: 14 GB/s (PCIe
    5.0) at 0.1 ms a read are 1.4 MB in flight, a twelfth of the smallest shard; 0.1 ms to open one adds 8 percent to
    reading 16 MiB, 2 to 64, 0.5 to 256, and beyond that only repairs get longer. Mixing: samples are in random order
    before they are cut into shards, and training mixes those of several shards again. Something-Something-v2: 19.4 GB
    are about 290 shards of 64 MiB with 760 clips each; in 256 MiB, 160 GB (mjpeg) are 600, 1.6 TB (y4m) 6,100.
    """
    size = _AUTO_LARGEST
    while size > _AUTO_SMALLEST and size * _AUTO_SHARDS > total:
        size //= 2
    return size
