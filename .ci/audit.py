"""Ask pip-audit which of the installed packages have known vulnerabilities, and say plainly where it could not know.

    python .ci/audit.py [--strict]

Exit status: 1 for a vulnerability; with --strict also where nothing, or not everything, could be looked up.
"""

import json
import subprocess
import sys

COMMAND = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]


def main() -> int:
    strict = "--strict" in sys.argv[1:]
    audited = subprocess.run(COMMAND, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(audited.stdout)["dependencies"]
    except (ValueError, KeyError):
        last = (audited.stderr.strip() or "no output").splitlines()[-1]
        print(f"NOT AUDITED: {last}; `pip install '.[audit]'`, and a network, are needed")
        return int(strict)
    unknown = [each["name"] for each in packages if "skip_reason" in each]
    found = [(each, fault) for each in packages for fault in each.get("vulns", [])]
    for each, fault in found:
        fixed = ", ".join(fault["fix_versions"]) or "no version yet"
        print(f"{each['name']} {each['version']}: {fault['id']}, fixed in {fixed}")
    if found:
        return 1
    if len(unknown) == len(packages):
        print(f"NOT AUDITED: none of {len(packages)} packages could be looked up; the vulnerability database is away")
        return int(strict)
    print(f"{len(packages) - len(unknown)} packages have no known vulnerability")
    if unknown:
        print(f"NOT AUDITED: {', '.join(unknown)}")
    return int(strict and bool(unknown))


if __name__ == "__main__":
    sys.exit(main())
