"""Python runs this at each start while this folder is on its path: child processes have the vocabulary too."""

from __future__ import annotations

from sitecustomize_vocabulary import install

install()
