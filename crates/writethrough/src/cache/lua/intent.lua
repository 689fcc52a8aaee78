-- The intent that a key holds. Nil when it holds anything else, of whatever type: that is not ours, and
-- in nobody's way. Of a malformed one the callers drop the writers that have no times. More is not
-- checked, because many writers of one key make a long intent.
local function intent(key)
  -- A key of another type answers with an error.
  if redis.pcall('GETRANGE', key, 0, 0) ~= 'I' then return nil end
  local state = redis.call('GET', key)
  if #state < 55 or (#state - 2) % 53 ~= 0 or not string.find(state, '^I[-+]%x') then return nil end
  return state
end
