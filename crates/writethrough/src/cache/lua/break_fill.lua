-- KeyState::break_fill. KEYS: the key. ARGV: token.
if redis.call('GETRANGE', KEYS[1], 0, 32) ~= 'L' .. ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
