-- A number that only ever rises: the operator runs a failed resource again when it does.
obj.spec.retry = (obj.spec.retry or 0) + 1
return obj
