"""Memory to read files into, again and again, as fast as the processor copies."""

import mmap


def page_buffer(size: int) -> memoryview:
    """`size` writable bytes that begin where a page does.

    A large bytearray begins 16 bytes into a page, where the page cache's pages have their first byte. AMD processors
    (seen on Zen 3) copy to such an offset at a fifth of their speed: 1.6 in place of 7 GB/s.
    """
    return memoryview(mmap.mmap(-1, size))
