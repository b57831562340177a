local status = obj.status or {}
local phase = status.phase or "Pending"
local ended = phase == "Succeeded" or phase == "Failed"
local suspended = obj.spec.suspend == true
-- Asked for, and not yet begun.
local asked = (obj.spec.retry or 0) > (status.observedRetry or 0)
-- A sweep may succeed although trials, or its report, have failed: they alone run again.
local failed = phase == "Failed"
for _, condition in ipairs(status.conditions or {}) do
  if ended and condition.status == "True" and (condition.type == "TrialsFailed" or condition.type == "ReportFailed") then
    failed = true
  end
end

local actions = {}
actions["suspend"] = { ["disabled"] = ended or suspended, ["iconClass"] = "fa fa-fw fa-pause" }
actions["resume"] = { ["disabled"] = not suspended, ["iconClass"] = "fa fa-fw fa-play" }
actions["retry"] = { ["disabled"] = not failed or asked, ["iconClass"] = "fa fa-fw fa-redo" }
return actions
