-- KeyState::end. KEYS: the key. ARGV: token, encoded value ('' for none), its TTL in ms.
local key, token, value, ttl = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local state = intent(key)

if not state then
  -- The intent was lost, so nothing that stands here is known to be current.
  redis.call('DEL', key)
  return 0
end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local others, own, latest = {}, false, 0
for at = 3, #state, 53 do
  local deadline, meant =
    tonumber(string.sub(state, at + 32, at + 44)), tonumber(string.sub(state, at + 45, at + 52))
  if deadline and meant and deadline > now and deadline - now <= meant then
    if string.sub(state, at, at + 31) == token then
      own = true
    else
      others[#others + 1] = string.sub(state, at, at + 52)
      latest = math.max(latest, deadline)
    end
  end
end

if #others > 0 then
  redis.call('SET', key, 'I+' .. table.concat(others), 'PXAT', latest)
elseif own and string.sub(state, 2, 2) == '-' and value ~= '' then
  redis.call('SET', key, value, 'PX', ttl)
  return 1
else
  redis.call('DEL', key)
end
return 0
