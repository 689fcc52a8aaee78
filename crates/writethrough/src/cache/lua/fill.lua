-- KeyState::fill. KEYS: the key. ARGV: token, encoded value, its TTL in ms.
if redis.call('GETRANGE', KEYS[1], 0, 32) ~= 'L' .. ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
