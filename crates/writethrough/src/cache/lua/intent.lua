-- The intent that a key holds. Nil when it holds anything else, of whatever type or a malformed one:
-- that is not ours, and in nobody's way. As KeyState::decode.
local writer = '^' .. string.rep('%x', 32) .. string.rep('%d', 21) .. '$'
local function intent(key)
  if redis.call('TYPE', key).ok ~= 'string' then return nil end
  if redis.call('GETRANGE', key, 0, 0) ~= 'I' then return nil end
  local state = redis.call('GET', key)
  if #state < 55 or (#state - 2) % 53 ~= 0 or not string.find(state, '^I[-+]') then return nil end
  for at = 3, #state, 53 do
    if not string.find(string.sub(state, at, at + 52), writer) then return nil end
  end
  return state
end
