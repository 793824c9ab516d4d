"""Say what the set-up will download and store, and stop where the disk has no room for it."""

from __future__ import annotations

import shutil
import sys

DOWNLOAD_GB = 2.9
DISK_GB = 7.0


def main() -> int:
    """Print the need; return 1 where the disk cannot take it."""
    free = shutil.disk_usage(".").free / 1e9
    print(
        f"The set-up downloads about {DOWNLOAD_GB} GB of wheels (PyTorch with its CUDA libraries "
        f"is most of it) and needs about {DISK_GB} GB of disk in this folder; {free:.0f} GB are "
        "free.\nWhere an index with PyTorch's CPU wheels is at hand, PIP_EXTRA_INDEX_URL makes "
        "both about five times smaller.",
        flush=True,
    )
    if free < DISK_GB:
        print(f"Not enough room: free {DISK_GB - free:.1f} GB first.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
