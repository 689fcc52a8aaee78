-- KeyState::expire. KEYS: the key. Takes away the announcements that have lapsed by this server's
-- clock, also those that a clock which was set back since has put too far away. Answers the state.
local key = KEYS[1]
local state = intent(key)
if not state then return redis.call('GET', key) end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local writers, latest = {}, 0
for at = 3, #state, 53 do
  local deadline, lifetime =
    tonumber(string.sub(state, at + 32, at + 44)), tonumber(string.sub(state, at + 45, at + 52))
  if deadline and lifetime and deadline > now and deadline - now <= lifetime then
    writers[#writers + 1] = string.sub(state, at, at + 52)
    latest = math.max(latest, deadline)
  end
end
if #writers == 0 then
  redis.call('DEL', key)
  return false
end
state = string.sub(state, 1, 2) .. table.concat(writers)
redis.call('SET', key, state, 'PXAT', latest)
return state
