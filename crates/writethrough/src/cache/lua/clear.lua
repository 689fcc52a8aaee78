-- Removes values, pages and fill leases, leaves intents and what is not ours. KEYS: one batch.
local removed = 0
for _, key in ipairs(KEYS) do
  if redis.call('TYPE', key).ok == 'string' then
    local tag = redis.call('GETRANGE', key, 0, 0)
    if tag == 'V' or tag == 'N' or tag == 'P' or tag == 'L' then
      removed = removed + redis.call('UNLINK', key)
    end
  end
end
return removed
