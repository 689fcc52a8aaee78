-- page::fill. KEYS: the collection, the page. ARGV: token, encoded page, TTL of both in ms.
local state = redis.call('GETRANGE', KEYS[1], 0, 33)
if state == 'L' .. ARGV[1] then
  redis.call('SET', KEYS[1], 'V' .. ARGV[1], 'PX', ARGV[3])
elseif state ~= 'V' .. ARGV[1] then
  return 0
end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
return 1
