-- KeyState::end. KEYS: the key. ARGV: token, encoded value ('' for none), its TTL in ms.
local key, token, value, ttl = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local state = intent(key)

if not state then
  -- The intent was lost, so nothing that stands here is known to be current.
  redis.call('DEL', key)
  return 0
end

local others, latest, own_in_time = in_time(state, milliseconds(), place(state, 3, token))
if others ~= '' then
  redis.call('SET', key, 'I+' .. others, 'PXAT', latest)
elseif own_in_time and string.sub(state, 2, 2) == '-' and value ~= '' then
  redis.call('SET', key, value, 'PX', ttl)
  return 1
else
  redis.call('DEL', key)
end
return 0
