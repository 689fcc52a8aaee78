-- KeyState::renew_fill. KEYS: the key. ARGV: token, how long the lease lasts from now, in ms.
if redis.call('GETRANGE', KEYS[1], 0, 32) ~= 'L' .. ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
