-- The intent that a key holds. Nil when it holds anything else, of whatever type or a malformed one:
-- that is not ours, and in nobody's way. As KeyState::decode. Many writers of one key make a long
-- intent, so no part of it is copied here, and each pattern is one run over what it checks.
local function intent(key)
  -- A key of another type answers with an error.
  if redis.pcall('GETRANGE', key, 0, 0) ~= 'I' then return nil end
  local state = redis.call('GET', key)
  if #state < 55 or (#state - 2) % 53 ~= 0 or not string.find(state, '^I[-+]') then return nil end
  if not string.find(state, '^%x+$', 3) then return nil end
  for at = 35, #state, 53 do
    local _, last = string.find(state, '^%d+', at)
    if not last or last < at + 20 then return nil end
  end
  return state
end
