"""Videos -> checked WebDataset shards. Never imports torch or salt_wds."""

__version__ = "0.1.0"
