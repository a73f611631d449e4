"""Runs the Python blocks of README.md with the installed package, not with the one in this checkout.

cd /tmp && python <checkout>/tests/publishing/readme_example.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import rotoopt

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Run them in order, in one namespace."""
    if ROOT / "rotoopt" in Path(rotoopt.__file__).resolve().parents:
        sys.exit(f"rotoopt must be imported from where it is installed, got {rotoopt.__file__}. Run this elsewhere.")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    if not blocks:
        sys.exit("README.md must have a Python block, got none.")
    exec("\n".join(blocks), {"__name__": "__main__"})
    print(f"README.md runs with rotoopt {rotoopt.__version__} in {Path(rotoopt.__file__).parent}")


if __name__ == "__main__":
    main()
