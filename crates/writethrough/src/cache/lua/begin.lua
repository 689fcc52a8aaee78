-- KeyState::begin. KEYS: the key. ARGV: token, lifetime in ms.
local key, token, lifetime = KEYS[1], ARGV[1], tonumber(ARGV[2])
local now = milliseconds()
local state = intent(key)
local writers, latest = '', 0
if state then writers, latest = in_time(state, now) end

local flag = '-'
if place(writers, 1, token) then
  flag = string.sub(state, 2, 2)
else
  if writers ~= '' then flag = '+' end
  writers = writers .. token .. string.format('%013d%08d', now + lifetime, lifetime)
  latest = math.max(latest, now + lifetime)
end
redis.call('SET', key, 'I' .. flag .. writers, 'PXAT', latest)
return 1
