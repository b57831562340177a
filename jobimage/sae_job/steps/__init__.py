"""One file per step, which wires the parts below from a spec; how a pod runs a step; and the local runner."""
