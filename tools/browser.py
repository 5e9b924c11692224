"""See that there is a Chromium, for the test of `sere report`'s page; run by `make test`.

On Debian, as root, it is installed (20 s, 100 MB). Elsewhere the test looks for one and says what
it skips for want of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
APT = ("apt-get", "-qq", "-o", "DPkg::Lock::Timeout=60")


def browser() -> str | None:
    """The first Chromium on the PATH."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def main() -> None:
    if browser():
        return
    if os.geteuid() or not shutil.which("apt-get"):
        print("browser: no Chromium; the test of the report page will be skipped", flush=True)
        return
    print(
        "browser: installing Chromium with apt-get, for the test of the report page ...", flush=True
    )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        [*APT, "update"],
        [*APT, "install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if done.returncode:
            print(f"browser: {' '.join(command)} failed: {done.stderr.strip()[-300:]}", flush=True)
            return


if __name__ == "__main__":
    main()
