"""What the pages for people name is there: files of the repository, other pages."""

import re

PATHS = re.compile(r"`((?:shard_tools|salt_wds|tests|docs|benchmarks|configs)/[\w/.]*)`")
LINKS = re.compile(r"\]\(([\w/.-]+\.md)[)#]")


def test_paths_and_links_exist(repository):
    pages = [*(repository / "docs").glob("*.md"), repository / "README.md", repository / "CONTRIBUTING.md"]
    missing = []
    for page in pages:
        text = page.read_text()
        missing += [f"{page.name}: {path}" for path in PATHS.findall(text) if not (repository / path).exists()]
        missing += [f"{page.name}: {link}" for link in LINKS.findall(text) if not (page.parent / link).exists()]
    assert not missing
