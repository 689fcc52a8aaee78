-- KeyState::begin. KEYS: the key. ARGV: token, lifetime in ms.
local key, token, lifetime = KEYS[1], ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local writers, flag, own, latest = {}, '-', false, 0

local state = intent(key)
if state then
  for at = 3, #state, 53 do
    local deadline, meant =
      tonumber(string.sub(state, at + 32, at + 44)), tonumber(string.sub(state, at + 45, at + 52))
    -- Further away than it was meant: this server's clock was set back since.
    if deadline and meant and deadline > now and deadline - now <= meant then
      writers[#writers + 1] = string.sub(state, at, at + 52)
      own = own or string.sub(state, at, at + 31) == token
      latest = math.max(latest, deadline)
      flag = string.sub(state, 2, 2)
    end
  end
end

if not own then
  if #writers > 0 then flag = '+' end
  writers[#writers + 1] = token .. string.format('%013d%08d', now + lifetime, lifetime)
  latest = math.max(latest, now + lifetime)
end
redis.call('SET', key, 'I' .. flag .. table.concat(writers), 'PXAT', latest)
return 1
