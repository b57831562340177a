"""A small kubelet: registers one Node, keeps it Ready, and runs the pods bound to it as processes of this machine.

It speaks to the API server as `system:node:NAME`, so that the Node authorizer and NodeRestriction bind it as they bind
a kubelet. Each container is process 1 of namespaces of its own (mounts, processes, IPC, host name) over an overlay of
this machine's root file system; pods share the machine's network, each with a loopback address of its own as pod IP.

- `settings`: what the agent is told, and which images it knows
- `api`: requests to and watches of the API server
- `agent`: which pods run here; `registration`: the Node and its lease; `logs`: what `kubectl logs` asks
- `pod`, `container`: the life of a pod and of its containers, and the status that tells it
- `pod_api`: what a pod reads and writes through the API server
- `volumes`, `environment`, `description`: what a container is given
- `shim`: the process between agent and container: builds its root, enforces its memory limit, ends it

Not there: exec, attach, port-forward, probes, CPU limits, updates of mounted ConfigMaps, a pod network.
"""
