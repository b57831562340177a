"""The health checks and actions below gitops/argo-cd as entries of Argo CD's ConfigMap argocd-cm.

    python tools/argo_cd_config.py --out gitops/argo-cd [--check]

The Lua files lie where Argo CD's own repository has them; a cluster's Argo CD takes them from argocd-cm.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sae_operator.api.base import GROUP
from sae_operator.api.generated import write_or_check

CUSTOMIZATIONS = Path(__file__).parents[1] / "gitops" / "argo-cd" / "resource_customizations" / GROUP
HEADER = """\
# Written by tools/argo_cd_config.py from resource_customizations/: edit the Lua files there.
# Adds these entries to Argo CD's settings and leaves the others alone (apply would remove those that apply made):
#   kubectl patch configmap argocd-cm -n argocd --type=merge --patch-file argocd-cm.yaml
apiVersion: v1
kind: ConfigMap
metadata:
  name: argocd-cm
  labels:
    app.kubernetes.io/name: argocd-cm
    app.kubernetes.io/part-of: argocd
data:
"""


def config_map() -> str:
    """The ConfigMap as YAML."""
    return HEADER + "".join(_entries(folder) for folder in sorted(CUSTOMIZATIONS.iterdir()))


def _entries(folder: Path) -> str:
    group_kind = f"{GROUP}_{folder.name}"
    actions = _block("discovery.lua", (folder / "actions" / "discovery.lua").read_text()) + "definitions:\n"
    for path in sorted((folder / "actions").glob("*/action.lua")):
        actions += f"- name: {path.parent.name}\n" + _indented(_block("action.lua", path.read_text()))
    entries = {"health": (folder / "health.lua").read_text(), "actions": actions}
    return "".join(
        _indented(_block(f"resource.customizations.{what}.{group_kind}", text)) for what, text in entries.items()
    )


def _block(key: str, text: str) -> str:
    return f"{key}: |\n{_indented(text)}"


def _indented(text: str) -> str:
    return "".join(f"  {line}" if line.strip() else line for line in text.splitlines(keepends=True))


if __name__ == "__main__":
    sys.exit(write_or_check({"argocd-cm.yaml": config_map()}, sys.argv[1:], program="python tools/argo_cd_config.py"))
