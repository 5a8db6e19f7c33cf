"""Files that version 0.1 wrote are read, reused and resumed by this version. How they were made: their README.md."""

from __future__ import annotations
