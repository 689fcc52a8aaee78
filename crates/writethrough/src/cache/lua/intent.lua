-- The intent that a key holds. Nil when it holds anything else, of whatever type or a malformed one:
-- that is not ours, and in nobody's way. As KeyState::decode. Many writers of one key make a long
-- intent, so no part of it is copied here.
local times = '^' .. string.rep('%d', 21)
local function intent(key)
  -- A key of another type answers with an error.
  if redis.pcall('GETRANGE', key, 0, 0) ~= 'I' then return nil end
  local state = redis.call('GET', key)
  if #state < 55 or (#state - 2) % 53 ~= 0 or not string.find(state, '^I[-+]') then return nil end
  if string.find(state, '%X', 3) then return nil end
  for at = 35, #state, 53 do
    if not string.find(state, times, at) then return nil end
  end
  return state
end
