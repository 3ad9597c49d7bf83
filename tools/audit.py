"""Says what pip-audit found: `make audit`, and CI.

    python tools/audit.py AUDIT.json

Exit status 1 for a known vulnerability. Where the advisories can't be reached, pip-audit leaves packages out; how many
were looked up is said, and a build machine without that service says that nothing was.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(file: Path) -> int:
    packages = json.loads(file.read_bytes())["dependencies"] if file.is_file() else []
    audited = [p for p in packages if "skip_reason" not in p]
    known = [f"{p['name']} {p['version']}: {v['id']}" for p in audited for v in p["vulns"]]
    if not audited:
        print("NOT AUDITED: not one package could be looked up; run make audit where the advisories can be reached")
    else:
        print(f"{len(audited)} of {len(packages)} packages were looked up; known vulnerabilities: {len(known)}")
        print(*known, sep="\n", end="")
    return int(bool(known))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
