"""`python -m llamarunner`."""

from __future__ import annotations

from llamarunner.cli import main

if __name__ == "__main__":
    main()
