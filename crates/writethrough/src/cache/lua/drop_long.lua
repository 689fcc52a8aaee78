-- Removes strings that are longer than they may be: no intent is. KEYS: the keys. ARGV: how long, in bytes.
local removed = 0
for _, key in ipairs(KEYS) do
  -- A key of another type answers with an error.
  local beyond = redis.pcall('GETRANGE', key, ARGV[1], ARGV[1])
  if type(beyond) == 'string' and beyond ~= '' then removed = removed + redis.call('UNLINK', key) end
end
return removed
