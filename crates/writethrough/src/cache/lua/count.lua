-- Counts the keys of one batch that hold a value. KEYS: one batch.
local values = 0
for _, key in ipairs(KEYS) do
  if redis.call('TYPE', key).ok == 'string' and redis.call('GETRANGE', key, 0, 0) == 'V' then
    values = values + 1
  end
end
return values
