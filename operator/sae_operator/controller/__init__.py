"""The imperative shell of the operator: it observes, asks `reconcile` what is wanted, and applies that.

`framework` imports kopf the light way; `settings` its settings; `handlers` the thin triggers of its watches; `watch`
watches the kinds of which there may be thousands. `credentials`, `client`, `breaker` and `paths` talk to the API
server. `store` holds slim projections of what was observed; `defaults`, `pods` and `progress` what is read on demand;
`census` drops what vanished unseen. `queue` is the per-key work queue; `observe` turns the store into what `reconcile`
takes; `executor` applies what it wants, with `merge` and `events`. `heartbeat` proves that all this works; `faults`
kills the process on purpose, in tests; `logs` formats; `app` wires it.
"""
