-- KeyState::expire. KEYS: the key. Takes away the announcements that have lapsed by this server's
-- clock, also those that a clock which was set back since has put too far away. Answers the state.
local key = KEYS[1]
local state = intent(key)
if not state then return redis.call('GET', key) end
local writers, latest = in_time(state, milliseconds())
if writers == '' then
  redis.call('DEL', key)
  return false
end
state = string.sub(state, 1, 2) .. writers
redis.call('SET', key, state, 'PXAT', latest)
return state
