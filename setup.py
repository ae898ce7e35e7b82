"""The description for a package index, which setup.cfg cannot make: its readers do not have the project's files."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup


def readme(text: str, files: str) -> str:
    """Return the README with its relative links below the address ``files``, or as plain text where that is empty."""
    link = rf"[\1]({files}/\2)" if files else r"\1"
    return re.sub(r"\[([^\]]*)\]\((?!https?://|#)([^)]*)\)", link, text)


if __name__ == "__main__":
    config = ConfigParser(interpolation=None)
    config.read("setup.cfg", "utf-8")
    setup(long_description=readme(Path("README.md").read_text("utf-8"), config["readme"]["files"]))
