-- Removes a value or a page if it still holds these bytes. KEYS: the key. ARGV: the bytes.
local key = KEYS[1]
if redis.call('TYPE', key).ok ~= 'string' then return 0 end
local tag = redis.call('GETRANGE', key, 0, 0)
-- A page has its stamp before its bytes.
local start = (tag == 'V' and 1) or (tag == 'P' and 33)
if not start or redis.call('GETRANGE', key, start, -1) ~= ARGV[1] then return 0 end
return redis.call('DEL', key)
