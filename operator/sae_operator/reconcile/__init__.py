"""Pure functions, no I/O: from (resource, what was observed, now) to (objects wanted, status, when to look again).

`observed` what a reconcile is given; `wanted` what it answers; `projection` raw API objects -> facts;
`names`, `children` and `defaults` the Jobs and ConfigMaps; `conditions`, `progress`, `attempts` parts of a status;
`diagnosis` what ails a pod; `rounds` and `steps` the life of one step's Job;
`cache` and `training_job` one reconcile per kind.
"""
