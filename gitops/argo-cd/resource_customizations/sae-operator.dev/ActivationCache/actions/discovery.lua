local status = obj.status or {}
local phase = status.phase or "Pending"
local ended = phase == "Ready" or phase == "Failed"
local suspended = obj.spec.suspend == true
-- Asked for, and not yet begun.
local asked = (obj.spec.retry or 0) > (status.observedRetry or 0)

local actions = {}
actions["suspend"] = { ["disabled"] = ended or suspended, ["iconClass"] = "fa fa-fw fa-pause" }
actions["resume"] = { ["disabled"] = not suspended, ["iconClass"] = "fa fa-fw fa-play" }
actions["retry"] = { ["disabled"] = phase ~= "Failed" or asked, ["iconClass"] = "fa fa-fw fa-redo" }
return actions
