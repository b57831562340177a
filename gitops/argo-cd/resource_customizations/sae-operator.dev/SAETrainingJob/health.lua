-- The conditions follow kstatus: Reconciling, Stalled and Ready are about the spec of generation observedGeneration.
local hs = { status = "Progressing", message = "waits for the operator to see this version of the spec" }
if obj.status == nil or obj.status.observedGeneration ~= obj.metadata.generation then
  return hs
end

local standard = { Ready = true, Reconciling = true, Stalled = true }
local holds = {}
local message = ""
local also = ""
for _, condition in ipairs(obj.status.conditions or {}) do
  holds[condition.type] = condition.status == "True"
  if condition.type == "Ready" then
    message = condition.message or ""
  end
end
for _, condition in ipairs(obj.status.conditions or {}) do
  -- What needs attention has a condition of its own, often with the words of Ready.
  if condition.status == "True" and not standard[condition.type] and condition.message ~= message then
    also = also .. "; " .. condition.type .. ": " .. (condition.message or "")
  end
end
hs.message = (obj.status.phase or "Pending") .. ": " .. message .. also

if holds.Reconciling then
  hs.status = "Progressing"
elseif holds.Stalled then
  hs.status = "Degraded"
elseif holds.Ready then
  hs.status = "Healthy"
elseif obj.status.phase == "Suspended" then
  hs.status = "Suspended"
  hs.message = message .. also
end
return hs
