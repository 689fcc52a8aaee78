-- The intent that a key holds. Nil when it holds anything else, of whatever type: that is not ours, and
-- in nobody's way. Of a malformed one the callers drop the writers that have no times. More is not
-- checked, because many writers of one key make a long intent.
local function intent(key)
  -- A key of another type answers with an error.
  if redis.pcall('GETRANGE', key, 0, 0) ~= 'I' then return nil end
  local state = redis.call('GET', key)
  if #state < 55 or (#state - 2) % 53 ~= 0 then return nil end
  return state
end

-- Where the writer with this token stands in a text of writers that begins at `from`. Nil when it does not.
local function place(text, from, token)
  local at = string.find(text, token, from, true)
  return at and (at - from) % 53 == 0 and at or nil
end

-- The writers of an intent whose time is not over, as they are written, without the one at `own`; the
-- latest deadline among them; and whether the time of the one at `own` is not over either.
-- Whole runs of them are copied, not each: this is where many writers of one key cost.
local function in_time(state, now, own)
  local sub, runs, from, latest, own_in_time = string.sub, {}, 3, 0, false
  for at = 3, #state, 53 do
    local deadline, lifetime = tonumber(sub(state, at + 32, at + 44)), tonumber(sub(state, at + 45, at + 52))
    -- Further away than it was meant: this server's clock was set back since.
    local over = not (deadline and lifetime and deadline > now and deadline - now <= lifetime)
    if over or at == own then
      runs[#runs + 1] = sub(state, from, at - 1)
      from = at + 53
      own_in_time = own_in_time or not over
    elseif deadline > latest then
      latest = deadline
    end
  end
  runs[#runs + 1] = sub(state, from)
  return table.concat(runs), latest, own_in_time
end

local function milliseconds()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
